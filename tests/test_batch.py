"""Prompts that are answered together get the tokens that each gets alone, whoever stands beside it."""

from typing import Any

import pytest
import torch

import answering.batch
from answering.batch import WIDTH, finished
from answering.decode_weights import FewRows, for_decoding
from answering.generate import GREEDY, generate
from model import GPT, GPTConfig
from models import small_model

CONFIG = GPTConfig(48, 301, 2, 4, 64)


@pytest.fixture(autouse=True)
def unwritten_memory_is_not_a_number():
    """What is read before it was written shows: torch fills new memory with NaN then."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def together(model: GPT, *how: Any, **named: Any) -> list[list[int]]:
    """The tokens after each prompt, in the order of the prompts."""
    return [answer for _, answer in sorted(finished(model, *how, **named))]


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 47 tokens, the first one as long as a context of 48 allows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [47, *torch.randint(1, 48, (count - 1,), generator=generator).tolist()]
    return [torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("count", [1, WIDTH + 5])
@pytest.mark.parametrize("form", ["plain", "few_rows"])
def test_greedy_tokens_are_those_of_one_prompt_at_a_time(count, form):
    """Up to the full context, the limit, or the stop token, so that rows end at different times and others take their
    places. Plain in fp64, where sums that are rounded otherwise cannot change which token is the likeliest."""
    model, prompts = small_model(config=CONFIG), prompts_of(count)
    if form == "few_rows":
        for_decoding(model, FewRows)
    else:
        model.double()
    stop = list(generate(model, prompts[0], 1))[0]
    for limit, stop_token in ((100, None), (7, None), (100, stop), (1, stop)):
        alone = [list(generate(model, prompt, limit, stop_token=stop_token)) for prompt in prompts]
        assert together(model, prompts, limit, stop_token=stop_token) == alone
    assert any(len(prompt) + len(answer) < 48 for prompt, answer in zip(prompts, alone)) or count == 1
    for unfit in ([], [0] * 48):  # before anything is computed
        with pytest.raises(ValueError, match=f"{len(unfit)} tokens does not fit a context of 48"):
            together(model, [[1], unfit], 1)
    assert together(model, [], 1) == []


@pytest.mark.parametrize("width", [1, 3, 8])
def test_answers_come_as_they_end_from_rows_that_are_filled_again(width, monkeypatch):
    model, prompts = small_model(config=CONFIG).double(), prompts_of(10)
    stop = together(model, prompts[7:8], 1)[0][0]  # so that some end early
    how = model, prompts, 40, GREEDY, stop
    whole = dict(enumerate(together(*how)))
    row_bytes = 2 * 2 * 64 * 48 * 8  # keys and values of two layers for a full context, in fp64
    found = []
    for name, value in (("WIDTH", width), ("LARGEST_CACHE", width * row_bytes + 7), ("LARGEST_CACHE", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(answering.batch, name, value)
            found.append(list(finished(*how)))
    assert all(len(each) == 10 and dict(each) == whole for each in found)
    assert found[0] == found[1] and (found[1] == found[2]) == (width == 1)  # as many as there is memory for
    assert [number for number, _ in found[2]] == sorted(range(10), key=lambda n: -len(prompts[n]))
