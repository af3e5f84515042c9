"""How good answers are: the loss of the expected ones, and counts over those that a model gives."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from answering.batch import finished
from answering.decode_weights import FewRows, for_decoding
from errors import CheckpointError
from instruct_format import END_OF_TEXT
from model import GPT, Documents

N_GRAM = 4


class Case(NamedTuple):
    """A document to be scored, or with no spans a prompt alone. Of several turns the last one is answered."""

    tokens: list[int]
    spans: list[tuple[int, int]]  # (start, end) of each expected response, with the <|endoftext|> that ends it

    @property
    def prompt(self) -> list[int]:
        return self.tokens[:self.spans[-1][0]] if self.spans else self.tokens

    @property
    def expected(self) -> list[int]:
        """The response that should come after the prompt, without its end."""
        return self.tokens[self.spans[-1][0]:self.spans[-1][1] - 1]


@torch.inference_mode()
def response_losses(model: GPT, cases: Sequence[Case]) -> Iterator[tuple[float, int]]:
    """Yield (sum of the cross entropy, number) of each case's response tokens, all turns of it. The mean over all is
    what training minimizes."""
    device = model.transformer.wte.weight.device
    for case in cases:
        tokens = torch.tensor(case.tokens, device=device)
        rows = torch.tensor([row for start, end in case.spans for row in range(start - 1, end - 1)],
                            dtype=torch.int64, device=device)  # the token before each response token predicts it
        hidden = model(tokens, Documents.of([len(tokens)], device), rows)
        yield float(F.cross_entropy(model.logits(hidden).float(), tokens[rows + 1], reduction="sum")), len(rows)


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """The share of 4-grams that came before in their answer, counted over all answers: seq-rep-4 of Welleck et al.
    2020, which is the mean over the answers. 0 when no answer has four tokens."""
    grams = [[tuple(answer[place:place + N_GRAM]) for place in range(len(answer) - N_GRAM + 1)] for answer in answers]
    return sum(len(each) - len(set(each)) for each in grams) / max(1, sum(map(len, grams)))


def evaluate(model: GPT, cases: Sequence[Case], limit: int, bar: Callable[..., Iterable[Any]]) -> tuple[
        dict[str, float | None], list[tuple[list[int], bool]]]:
    """What a model makes of all cases: its scores by name (loss: nats a response token; None where nothing was
    expected), and its greedy answers of at most limit tokens, each with whether it ended by itself. Sums and counts
    over all cases are each divided once. bar(iterable, total=...) shows how far it is. Raises CheckpointError
    when the loss is no finite number."""
    if model.transformer.wte.weight.device.type == "cpu":
        for_decoding(model, FewRows)
    scored = [case for case in cases if case.spans]
    losses: list[tuple[float, int]] = list(bar(response_losses(model, scored), total=len(scored)))
    found: dict[int, list[int]] = dict(bar(finished(model, [case.prompt for case in cases], limit,
                                                    stop_token=END_OF_TEXT), total=len(cases)))
    answers = [(found[index], len(found[index]) < min(limit, model.config.context_length - len(case.prompt)))
               for index, case in enumerate(cases)]
    loss = perplexity = exact = None
    if losses:
        loss = sum(each for each, _ in losses) / sum(count for _, count in losses)
        if not math.isfinite(loss):
            raise CheckpointError("its loss is not a finite number: the weights are damaged; use another checkpoint")
        perplexity = math.exp(min(loss, 700.0))
        exact = sum((case.expected, True) == answer for case, answer in zip(cases, answers)) / len(cases)
    n_tokens = sum(len(tokens) for tokens, _ in answers)
    return {"loss": loss, "perplexity": perplexity, "ended": sum(ended for _, ended in answers) / len(cases),
            "tokens": n_tokens / len(cases), "repeated": repetition([tokens for tokens, _ in answers]),
            "exact": exact}, answers
