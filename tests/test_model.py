"""The model is GPT-2: the same logits and the same greedy ids as transformers, packed, cached, or one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoint import normalize_weights
from generate import generate
from model import GPT, Documents, GPTConfig, KVCache

CONFIG = GPTConfig(context_length=48, vocab_size=301, n_layer=3, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def pair() -> tuple[GPT, GPT2LMHeadModel]:
    """Our model and transformers' with the same random weights."""
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=CONFIG.vocab_size, n_positions=CONFIG.context_length,
                                           n_layer=CONFIG.n_layer, n_head=CONFIG.n_head, n_embd=CONFIG.n_embd)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that biases and norms count too
    model = GPT(CONFIG)
    model.load_state_dict(normalize_weights(reference.state_dict(), "transformers"))
    return model.eval(), reference


def tokens_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def reference_logits(reference: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    return reference(tokens[None]).logits[0]


@torch.no_grad()
def test_one_document_equals_transformers(pair):
    model, reference = pair
    tokens = tokens_of(CONFIG.context_length, 1)
    logits = model.logits(model(tokens, Documents.of([len(tokens)])))
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_transformers_on_each_alone(pair):
    model, reference = pair
    lengths = [48, 1, 17, 17, 5, 2, 48]
    documents = [tokens_of(length, seed) for seed, length in enumerate(lengths)]
    logits = model.logits(model(torch.cat(documents), Documents.of(lengths)))
    for tokens, found in zip(documents, logits.split(lengths)):
        torch.testing.assert_close(found, reference_logits(reference, tokens), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 48, [48], [7, 1, 1, 20, 19], [47, 1]])
def test_cached_in_any_pieces_equals_transformers(pair, pieces):
    model, reference = pair
    tokens = tokens_of(CONFIG.context_length, 2)
    cache = KVCache(CONFIG)
    logits = torch.cat([model.logits(model.decode(piece, cache)) for piece in tokens.split(pieces)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_ids_equal_transformers_generate_up_to_the_full_context(pair):
    """64 prompts: the cache, a full recomputation and transformers choose the same tokens."""
    model, reference = pair
    for seed in range(64):
        prompt = tokens_of(1 + seed % 47, seed)
        room = CONFIG.context_length - len(prompt)
        ours = list(generate(model, prompt.tolist(), room))
        theirs = reference.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=room,
                                    do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt):]
        assert ours == theirs.tolist()
        recomputed = torch.cat([prompt, torch.tensor(ours, dtype=torch.int64)])
        scores = model.logits(model(recomputed, Documents.of([len(recomputed)])))
        assert scores.argmax(1)[len(prompt) - 1:-1].tolist() == ours


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, CONFIG.context_length), min_size=1, max_size=6), which=st.integers(0, 5))
def test_neighbours_change_nothing(pair, lengths, which):
    """Replacing every other document leaves a document's states the same to the bit."""
    model, _ = pair
    which %= len(lengths)
    states = []
    for seed in (0, 100):
        documents = [tokens_of(n, (7 if i == which else seed) + i) for i, n in enumerate(lengths)]
        states.append(model(torch.cat(documents), Documents.of(lengths)).split(lengths)[which])
    assert torch.equal(*states)
    alone = model(tokens_of(lengths[which], 7 + which), Documents.of([lengths[which]]))
    torch.testing.assert_close(states[0], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_only_the_rows_asked_for_are_computed_at_the_end(pair):
    model, _ = pair
    lengths, rows = [9, 30], torch.tensor([3, 8, 9, 38])
    tokens = tokens_of(39, 3)
    whole = model(tokens, Documents.of(lengths))
    torch.testing.assert_close(model(tokens, Documents.of(lengths), rows), whole[rows], atol=1e-5, rtol=1e-5)


def test_positions_restart_with_each_document():
    documents = Documents.of([3, 1, 2])
    assert documents.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert documents.starts.tolist() == [0, 3, 4, 6]


def test_context_overflow_is_refused(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="do not fit a context of 48"):
        model.decode(tokens_of(49, 0), KVCache(CONFIG))
    with pytest.raises(ValueError, match="does not fit"):
        next(generate(model, [0] * 48, 1))


@pytest.mark.parametrize("sizes", [{"n_head": 5}, {"n_layer": 0}, {"vocab_size": 1.5}, {"n_embd": "64"}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        GPTConfig(**sizes)


def test_parameters_are_those_of_gpt2_and_the_output_is_tied():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert "transformer.h.11.attn.c_attn.weight" in model.state_dict()
    assert not any(name.startswith("lm_head") for name in model.state_dict())
