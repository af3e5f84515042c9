"""Answers of the model in training to a few val prompts, the same ones at every evaluation."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from answering.batch import finished
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
    None when it is stopped before all are there."""
    def is_long(number: int) -> bool:
        start, end = trained_spans(data.example(number).loss_mask)[0]
        return end - start > TOKENS // 2

    prompts, expected, decode = list[list[int]](), list[list[int]](), tokenizer().decode
    for number in sorted(range(min(CANDIDATES, len(data))), key=is_long):
        document = data.example(number)
        tokens, (start, end) = document.tokens.tolist(), trained_spans(document.loss_mask)[0]
        if start < model.config.context_length and len(prompts) < PROMPTS:  # and so there is room for an answer
            prompts.append(tokens[:start])
            expected.append([token for token in tokens[start:end] if token != END_OF_TEXT])
    answers = dict[int, list[int]]()
    with suppress(CheckpointError):  # scores that are not finite: the step says so, and what to do
        answers.update(finished(model, prompts, TOKENS, stop_token=END_OF_TEXT, is_stopped=is_stopped))
    if len(answers) < len(prompts):
        return []
    return [Sample(decode(prompt), decode(wanted), decode(answers[number]),
                   len(answers[number]) < min(TOKENS, model.config.context_length - len(prompt)))
            for number, (prompt, wanted) in enumerate(zip(prompts, expected))]
