"""Questions from a pipe or a file: one a line, as text or as JSON objects. A line that holds none does not end them."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from answering.answer import Answer, Question
from answering.batch import finished
from data.values import BadRow, parse_json
from errors import UserError
from instruct_format import END_OF_TEXT

Made = TypeVar("Made")


def text_of(data: bytes, place: str = "") -> str:
    """Data as text, without a byte order mark. Raises UserError, which begins with place, when they are none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{place}not UTF-8: byte 0x{byte:02x} in column {error.start + 1}") from error
    if "\0" in text:
        raise UserError(f"{place}a NUL character, which is in no text; is it UTF-16?")
    return text


def questions_of(read_line: Callable[[], bytes], input: str, as_objects: bool,
                 make: Callable[[Question], Made]) -> Iterator[tuple[Question, Made | UserError]]:
    """Of each line that is not blank: its question as far as it is known, and what make makes of that, or why there is
    nothing, which names the line. input goes with the first."""
    for number, line in enumerate(iter(read_line, b""), 1):
        shown = line.decode("utf-8-sig", "replace").strip()
        if not shown:
            continue
        question = Question("" if as_objects else shown, input)
        try:
            text = text_of(line)
            if as_objects:
                question = _question_of(parse_json(text.rstrip()))
            yield question, make(question)
        except UserError as error:
            yield question, UserError(f"line {number}: {error}")
        input = ""


def _question_of(row: Any) -> Question:
    """Raises UserError unless this is an object with an instruction and perhaps an input; other names are ignored."""
    if not isinstance(row, dict) or "instruction" not in row:
        raise UserError(str(row) if isinstance(row, BadRow) else "expected an object with an instruction")
    question = Question(row["instruction"], "" if row.get("input") is None else row["input"])
    for name, value in question._asdict().items():
        if type(value) is not str:  # numbers are texts of another type
            raise UserError(f"{name!r} must be text")
    return question


def answer_together(answers: Sequence[Answer], is_stopped: Callable[[], bool]) -> None:
    """Find the tokens of several answers at once: the same ones, in less time. Some stay unknown when it is stopped."""
    if answers:
        begin, model, settings = time.perf_counter(), answers[0].model, answers[0].settings
        for number, tokens in finished(model, [answer.prompt for answer in answers], settings.max_new_tokens, settings,
                                       END_OF_TEXT, [answer.generator() for answer in answers], is_stopped):
            answers[number].known, answers[number].seconds = tokens, time.perf_counter() - begin
