"""Answers of the model in training to a few val prompts, the same ones at every evaluation."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from answering.batch import finished
from answering.scores import Case
from dataloader_instruct import InstructData
from errors import CheckpointError
from instruct_format import END_OF_TEXT, tokenizer, trained_spans
from model import GPT

PROMPTS, TOKENS = 8, 64  # how many prompts, and the longest answer
CANDIDATES = 100


class Sample(NamedTuple):
    """A prompt, the answer of the data, and the model's, which is greedy."""

    prompt: str
    expected: str
    answer: str
    is_ended: bool  # by the model itself, not by the limit


def sample_answers(model: GPT, data: InstructData, is_stopped: Callable[[], bool]) -> list[Sample]:
    """The model's answers to the first prompts whose expected answer is short enough to be reached (then to others).
    None of them when it is stopped before all are there. Of several turns the last one is answered, as in an
    evaluation."""
    documents, context_length = map(data.example, range(min(CANDIDATES, len(data)))), model.config.context_length
    cases = [Case(tokens.tolist(), trained_spans(loss_mask)) for tokens, loss_mask in documents]
    cases = sorted(cases, key=lambda case: len(case.expected) >= TOKENS // 2)[:PROMPTS]
    answers, decode = dict[int, list[int]](), tokenizer().decode
    with suppress(CheckpointError):  # scores that are not finite: the step says so, and what to do
        answers.update(finished(model, [case.prompt for case in cases], TOKENS, stop_token=END_OF_TEXT,
                                is_stopped=is_stopped))
    if len(answers) < len(cases):
        return []
    return [Sample(decode(case.prompt), decode(case.expected), decode(answers[number]),
                   len(answers[number]) < min(TOKENS, context_length - len(case.prompt)))
            for number, case in enumerate(cases)]
