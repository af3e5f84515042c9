"""Answers of the model in training to a few val prompts, the same ones at every evaluation."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from answering.generate import generate
from dataloader_instruct import InstructData
from instruct_format import END_OF_TEXT, tokenizer, trained_spans
from model import GPT

PROMPTS, TOKENS = 4, 64  # how many prompts, and the longest answer
CANDIDATES = 100


class Sample(NamedTuple):
    """A prompt, the answer of the data, and the model's, which is greedy."""

    prompt: str
    expected: str
    answer: str
    is_ended: bool  # by the model itself, not by the limit


def sample_answers(model: GPT, data: InstructData, is_stopped: Callable[[], bool]) -> list[Sample]:
    """The model's answers to the first prompts whose expected answer is short enough to be reached (then to others)."""
    def is_long(number: int) -> bool:
        start, end = trained_spans(data.example(number).loss_mask)[0]
        return end - start > TOKENS // 2

    samples: list[Sample] = []
    decode = tokenizer().decode
    for number in sorted(range(min(CANDIDATES, len(data))), key=is_long)[:PROMPTS]:
        document = data.example(number)
        tokens, (start, end) = document.tokens.tolist(), trained_spans(document.loss_mask)[0]
        answer: list[int] = []
        with suppress(ValueError):  # a prompt as long as the context has no room for an answer
            for token in generate(model, tokens[:start], TOKENS, stop_token=END_OF_TEXT):
                answer.append(token)
                if is_stopped():
                    return samples
        is_ended = len(answer) < min(TOKENS, model.config.context_length - start)
        expected = [token for token in tokens[start:end] if token != END_OF_TEXT]
        samples.append(Sample(decode(tokens[:start]), decode(expected), decode(answer), is_ended))
    return samples
