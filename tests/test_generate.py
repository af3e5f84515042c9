"""Sampling draws from the distribution it says, and never a padding token; decoding is what linear layers compute."""

from functools import partial

import pytest
import torch

from answering.decode_weights import Blocks, Columns, FewRows, OneRowInt8, for_decoding
from answering.generate import GREEDY, choose, generate, likeliest
from answering.settings import Settings
from errors import CheckpointError
from model import GPTConfig, KVCache
from models import small_model

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
sampling = partial(Settings, Settings().max_new_tokens)  # of temperature, top_k, top_p


def probabilities(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Those of likeliest for all tokens: logits (n_vocab,) -> probabilities (n_vocab,)."""
    tokens, kept = likeliest(logits, settings)
    return torch.zeros(logits.size(0)).index_copy(0, tokens, kept.float())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.7, 0.95, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    """Of its processors, whose order is the same: over six tokens, and over the whole vocabulary."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for logits in (LOGITS, 3 * torch.randn(50257, generator=torch.Generator().manual_seed(0))):
        scores = TemperatureLogitsWarper(temperature)(None, logits[None].double())
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        expected = TopPLogitsWarper(top_p)(None, scores).softmax(1)[0]
        found = probabilities(logits, sampling(temperature, top_k, top_p)).double()
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-9, 1e9, 1e308])
@pytest.mark.parametrize("top_k", [0, 4])
def test_no_temperature_overflows(temperature, top_k):
    for logits in (LOGITS, LOGITS * 1e37):
        found = probabilities(logits, sampling(temperature, top_k))
        assert found.isfinite().all() and abs(float(found.sum()) - 1) < 1e-6
        assert temperature > 1 or found.tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [GREEDY, Settings(), sampling(1.0, 0, 1.0)])
def test_scores_that_are_not_finite_are_an_error(settings, bad):
    for logits in (LOGITS.where(LOGITS != 0.5, bad), torch.full((6,), bad), torch.full((6,), float("-inf"))):
        with pytest.raises(CheckpointError, match="not finite numbers"):
            choose(logits, settings)
    assert choose(LOGITS.where(LOGITS != 0.5, float("-inf")), GREEDY) == 0  # some may be


def test_repetition_penalty_weighs_the_last_64_tokens_of_the_answer():
    """Against transformers' on the same tokens; tokens of the prompt are not weighed."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalized = sampling(1.0, 0, 1.0)._replace(repetition_penalty=1.8)
    for answer in ([0], [0, 1, 1], [0, 1, 2, 3], [5] + [4] * 64, []):
        recent = torch.tensor([answer[-64:]], dtype=torch.int64)
        expected = RepetitionPenaltyLogitsProcessor(1.8)(recent, LOGITS[None].clone())[0] if answer else LOGITS
        draws = [[choose(scores, settings, torch.Generator().manual_seed(seed), answer) for seed in range(50)]
                 for scores, settings in ((LOGITS, penalized), (expected, sampling(1.0, 0, 1.0)))]
        assert draws[0] == draws[1]
        assert choose(LOGITS, penalized._replace(temperature=0.0), answer=answer) == int(expected.argmax())
    model, greedy = small_model(config=GPTConfig(128, 97, 2, 2, 32)), GREEDY._replace(repetition_penalty=1.8)
    assert list(generate(model, [5], 60, greedy)) != list(generate(model, [5], 60))


def test_a_long_prompt_is_read_in_pieces_between_which_it_stops(monkeypatch):
    model, sizes = small_model(config=GPTConfig(1024, 97, 2, 2, 32)), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, cache: sizes.append(len(tokens)) or decode(tokens, cache))
    prompt = [number % 97 for number in range(700)]
    tokens = list(generate(model, prompt, 3))
    assert sizes == [128] * 5 + [60, 1, 1] and len(tokens) == 3
    for stop_after in (1, 3, 6, 7):
        sizes.clear()
        found = list(generate(model, prompt, 3, is_stopped=lambda: len(sizes) >= stop_after))  # noqa: B023
        assert found == tokens[:max(0, stop_after - 6)]
        assert len(sizes) == stop_after


def test_draws_follow_the_distribution():
    """20,000 draws: chi-squared below its 0.999 quantile for the kept tokens (seeded, so it never flickers)."""
    settings, generator = sampling(0.8, 5, 0.97), torch.Generator().manual_seed(0)
    probability = probabilities(LOGITS, settings)
    draws = torch.bincount(torch.tensor([choose(LOGITS, settings, generator) for _ in range(20_000)]), minlength=6)
    kept = probability > 0
    assert draws[~kept].sum() == 0
    statistic = ((draws - 20_000 * probability)[kept] ** 2 / (20_000 * probability[kept])).sum()
    assert statistic < 18.47  # 4 degrees of freedom


@pytest.mark.parametrize("settings", [GREEDY, Settings(), sampling(5.0, 0, 1.0), sampling(1.0, 50_300, 1.0)])
def test_padding_rows_are_never_chosen(settings):
    logits, generator = torch.zeros(50304), torch.Generator().manual_seed(0)
    logits[50257:] = 100.0  # were they not left out, nothing else would be chosen
    assert all(choose(logits, settings, generator) < 50257 for _ in range(50))


def test_it_stops_at_the_stop_token_at_the_limit_and_at_the_full_context():
    model = small_model(config=GPTConfig(32, 97, 2, 2, 32))
    tokens = list(generate(model, [5], 100))
    assert len(tokens) == 31  # the context of 32
    assert list(generate(model, [5], 3)) == tokens[:3]
    assert list(generate(model, [5], 100, stop_token=tokens[4])) == tokens[:tokens.index(tokens[4])]
    for prompt in ([], [0] * 32):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens does not fit a context of 32"):
            next(generate(model, prompt, 1))


@pytest.mark.parametrize("form", [Columns, Blocks, FewRows])
def test_decoding_gives_the_logits_of_linear_layers(form):
    plain, decoding = small_model(), small_model()
    for_decoding(decoding, form)
    tokens = torch.randint(0, plain.config.vocab_size, (200,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for pieces in ((200,), (1,) * 20, (50, 1, 1, 148)):
            caches = KVCache(plain.config), KVCache(plain.config)
            for piece in tokens[:sum(pieces)].split(pieces):
                one, other = (model.logits(model.decode(piece, cache))
                              for model, cache in zip((plain, decoding), caches))
                assert torch.allclose(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (16, 16), (97, 33), (385, 64), (2304, 768), (50257, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_is_a_linear_layer_in_memory_of_its_own_whatever_the_shape_and_the_rows(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator, dtype=dtype) for size in (shape, shape[0], (9, shape[1])))
    layers = [form(weight, bias) for form in (Columns, *[Blocks, FewRows] * (dtype is torch.float32))]
    expected = x.double() @ weight.double().t() + bias.double()
    weight.zero_()
    for layer in layers:
        for rows in (1, 1, 3, 9):  # the first call leaves the layer as it was
            assert torch.allclose(layer(x[:rows]).double(), expected[:rows], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("n_out", [97, 384, 385, 800])
def test_int8_rounds_a_weight_by_half_a_step_at_most_and_neither_inputs_nor_bias(n_out, threads, monkeypatch):
    """A step is a 255th of the range of the weights that share a row of the table. Several rows are not rounded."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n_out, 64, generator=generator), 1000 * torch.randn(n_out, generator=generator)
    layer = OneRowInt8(weight, bias)
    width = layer.table.size(1) - 8  # a row ends with its step and its smallest value, in fp32
    filled = torch.cat([weight, weight.new_zeros(-n_out % width, 64)])
    steps = torch.cat([part.amax(0, keepdim=True).sub(part.amin(0)).div(255).expand(len(part), -1)
                       for part in filled.split(width)])[:n_out]
    for x in (*torch.eye(64).split(1), torch.randn(1, 64, generator=generator)):
        found, exact = layer(x), x @ weight.t() + bias
        bound = (x.abs() @ steps.t()) / 2 + 1e-3  # the last for sums with numbers of some thousands
        assert found.dtype == torch.float32 and bool(((found - exact).abs() <= bound).all())
        assert not torch.equal(found, exact)
        assert torch.allclose(layer(x.expand(3, 64)), exact.expand(3, n_out), atol=2e-3, rtol=0)
