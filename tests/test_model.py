"""The model is GPT-2: the same logits and the same greedy ids as transformers, packed, cached, or one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from answering.generate import generate
from model import GPT, Documents, GPTConfig, KVCache
from models import small_model, transformers_model

CONTEXT = 48
CONFIG = GPTConfig(CONTEXT, vocab_size=301, n_layer=3, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def pair():
    """Our model and transformers' with the same random weights, for reading."""
    model = small_model(config=CONFIG).eval()
    with torch.no_grad():
        yield model, transformers_model(model)


def tokens_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def packed(model: GPT, *documents: torch.Tensor) -> torch.Tensor:
    return model(torch.cat(documents), Documents.of([len(tokens) for tokens in documents]))


@pytest.mark.parametrize("lengths", [[CONTEXT], [48, 1, 17, 17, 5, 2, 48]], ids=len)
def test_each_document_equals_transformers_on_it_alone(pair, lengths):
    model, reference = pair
    documents = [tokens_of(length, seed) for seed, length in enumerate(lengths)]
    for tokens, found in zip(documents, model.logits(packed(model, *documents)).split(lengths)):
        torch.testing.assert_close(found, reference(tokens[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 48, [48], [7, 1, 1, 20, 19], [47, 1]])
def test_cached_in_any_pieces_equals_transformers(pair, pieces):
    model, reference = pair
    tokens, cache = tokens_of(CONTEXT, 2), KVCache(CONFIG)
    logits = torch.cat([model.logits(model.decode(piece, cache)) for piece in tokens.split(pieces)])
    torch.testing.assert_close(logits, reference(tokens[None]).logits[0], atol=1e-4, rtol=0)


def test_greedy_ids_equal_transformers_generate_up_to_the_full_context(pair):
    """64 prompts: the cache, a full recomputation and transformers choose the same tokens."""
    model, reference = pair
    for seed in range(64):
        prompt = tokens_of(1 + seed % 47, seed)
        room = CONTEXT - len(prompt)
        ours = list(generate(model, prompt.tolist(), room))
        theirs = reference.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=room,
                                    do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt):]
        scores = model.logits(packed(model, torch.tensor([*prompt, *ours])))
        assert ours == theirs.tolist() == scores.argmax(1)[len(prompt) - 1:-1].tolist()


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=6), which=st.integers(0, 5))
def test_neighbours_change_nothing(pair, lengths, which):
    """Replacing every other document leaves a document's states the same to the bit."""
    model, _ = pair
    which %= len(lengths)
    states = []
    for seed in (0, 100):
        documents = [tokens_of(n, (7 if i == which else seed) + i) for i, n in enumerate(lengths)]
        states.append(packed(model, *documents).split(lengths)[which])
    assert torch.equal(*states)
    torch.testing.assert_close(states[0], packed(model, documents[which]), atol=2e-5, rtol=1e-5)


def test_impossible_sizes_and_a_context_that_overflows_are_refused(pair):
    with pytest.raises(ValueError, match="do not fit a context of 48"):
        pair[0].decode(tokens_of(49, 0), KVCache(CONFIG))
    for name, value in {"n_head": 5, "n_layer": 0, "vocab_size": 1.5, "n_embd": "64"}.items():
        with pytest.raises(ValueError, match=name):
            GPTConfig(**{name: value})


def test_parameters_are_those_of_gpt2_and_the_output_is_tied():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert "transformer.h.11.attn.c_attn.weight" in model.state_dict()
    assert not any(name.startswith("lm_head") for name in model.state_dict())
