"""From a question to the text of its answer, piece by piece: the prompt of training, whole characters, why it ended."""

import codecs
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from answering.generate import generate
from answering.settings import Settings
from errors import UserError
from instruct_format import END_OF_TEXT, encode_example, encode_prompt, tokenizer
from model import GPT

LONGEST_TOKEN = 128  # characters: a longer question than this times the context need not be tokenized
# A header of the template at the start of a line: the model begins another question, its answer is over.
_HEADERS = ("### Instruction:", "### Input:", "### Response:")
_HEADER = re.compile(rf"(?:^|\n+)(?:{'|'.join(_HEADERS)})")


class Question(NamedTuple):
    instruction: str
    input: str = ""


class Answer:
    """The answer to one question, complete once its pieces were all taken. Its seed alone, drawn unless the settings
    have one, decides what is sampled.

    turns are the answers before it, which the model is to know of. The oldest are left out where question and answer
    need their room; n_turns says how many stayed. Raises UserError when the question does not fit alone.
    """

    def __init__(self, model: GPT, instruction: str, input: str, settings: Settings,
                 turns: Sequence["Answer"] = ()) -> None:
        self.model, self.question, self.settings = model, Question(instruction, input), settings
        self.seed = secrets.randbits(32) if settings.seed is None else settings.seed
        self.text = ""
        self.tokens = 0
        self.known: list[int] | None = None  # all tokens, if they were found together with those of other answers
        self.seconds = self.first_seconds = 0.0
        self.stopped = "end"  # the model was done; or length, context (it is full), interrupt
        self.prompt = encode_question(context_length := model.config.context_length, self.question)
        room = context_length - len(self.prompt) - settings.room(context_length)
        self.n_turns = 0
        for turn in reversed(turns):
            before = encode_example(*turn.question, turn.text)[0]
            room -= len(before)
            if room < 0:
                break
            self.prompt = before + self.prompt
            self.n_turns += 1

    def pieces(self, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The text as the model gives it, in whole characters, until it ends or is_stopped. What may yet become a
        header of the template waits until it is known."""
        begin = time.perf_counter() - self.seconds
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        limit = min(self.settings.max_new_tokens, self.model.config.context_length - len(self.prompt))
        text, header = "", None
        for token in generate(self.model, self.prompt, limit, self.settings, END_OF_TEXT, self.generator(),
                              is_stopped) if self.known is None else self.known:
            self.first_seconds = self.first_seconds or time.perf_counter() - begin
            self.tokens += 1
            text += utf8.decode(tokenizer().decode_single_token_bytes(token))
            if header := _HEADER.search(text, len(self.text)):
                break
            yield self._show(text, _certain(text))
        else:
            if self.known is None and is_stopped():
                self.stopped = "interrupt"
            elif self.tokens == limit:
                self.stopped = "length" if limit == self.settings.max_new_tokens else "context"
        text += utf8.decode(b"", final=True)
        yield self._show(text, header.start() if header else len(text))
        self.seconds = time.perf_counter() - begin

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _show(self, text: str, end: int) -> str:
        """What of text[:end] was not shown yet."""
        begin, self.text = len(self.text), text[:end]
        return self.text[begin:]


def encode_question(context_length: int, question: Question) -> list[int]:
    """The prompt's tokens. Raises UserError when they leave no room for an answer."""
    if not question.instruction.strip():
        raise UserError("the question is empty")
    for name, part in {"question": question._replace(input=""), "question with its input": question}.items():
        hopeless = sum(map(len, part)) > LONGEST_TOKEN * context_length
        prompt = [] if hopeless else encode_prompt(*part)
        if hopeless or len(prompt) >= context_length:
            raise UserError(f"the {name} has {len(prompt) or 'far more'} tokens, too many for a context of "
                            f"{context_length}; shorten {'the input' if 'input' in name else 'it'}")
    return prompt


def _certain(text: str) -> int:
    """The length of text without an end that may be the beginning of a header."""
    line = text.rfind("\n") + 1
    may_be_header = any(header.startswith(text[line:]) for header in _HEADERS)
    return len(text[:line].rstrip("\n")) if may_be_header else len(text)
