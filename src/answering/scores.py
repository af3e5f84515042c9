"""How good answers are: the loss of the expected ones, and counts over those that a model gives."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from errors import CheckpointError
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
    def expected(self) -> list[int] | None:
        """The response that should come after the prompt, without its end."""
        return self.tokens[self.spans[-1][0]:self.spans[-1][1] - 1] if self.spans else None


class Scores(NamedTuple):
    """What a model makes of all cases; None where nothing was expected."""

    loss: float | None  # nats a response token
    perplexity: float | None
    ended: float  # share of the answers that end by themselves
    tokens: float  # mean length of an answer
    repeated: float  # share of repeated 4-grams
    exact: float | None  # share of the answers that are the expected one


@torch.inference_mode()
def response_losses(model: GPT, cases: Sequence[Case]) -> Iterator[tuple[float, int]]:
    """Yield (sum of the cross entropy, number) of each case's response tokens, all turns of it. The mean over all is
    what training minimizes."""
    device = model.transformer.wte.weight.device
    for case in cases:
        tokens = torch.tensor(case.tokens, device=device)
        rows = torch.tensor([row for start, end in case.spans for row in range(max(start, 1) - 1, end - 1)],
                            dtype=torch.int64, device=device)  # the token before each response token predicts it
        hidden = model(tokens, Documents.of([len(tokens)], device), rows)
        yield float(F.cross_entropy(model.logits(hidden).float(), tokens[rows + 1], reduction="sum")), len(rows)


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """1 - distinct 4-grams / all 4-grams, distinct within their answer, counted over all answers: seq-rep-4 of Welleck
    et al. 2020, which is the mean over the answers. 0 when no answer has four tokens."""
    grams = [[tuple(answer[place:place + N_GRAM]) for place in range(len(answer) - N_GRAM + 1)] for answer in answers]
    return 1 - sum(len(set(each)) for each in grams) / max(1, sum(map(len, grams))) if any(grams) else 0.0


def scores_of(cases: Sequence[Case], losses: Sequence[tuple[float, int]], answers: Sequence[Sequence[int]],
              ended: Sequence[bool]) -> Scores:
    """Sums and counts over all cases, each divided once. Raises CheckpointError when the loss is no finite number."""
    loss = perplexity = exact = None
    if losses:
        loss = sum(each for each, _ in losses) / sum(count for _, count in losses)
        if not math.isfinite(loss):
            raise CheckpointError("its loss is not a finite number: the weights are damaged; use another checkpoint")
        perplexity = math.exp(min(loss, 700.0))
        exact = sum(case.expected == list(answer) and end
                    for case, answer, end in zip(cases, answers, ended)) / len(cases)
    return Scores(loss, perplexity, sum(ended) / len(cases), sum(map(len, answers)) / len(cases), repetition(answers),
                  exact)
