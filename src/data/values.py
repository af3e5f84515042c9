"""What rows are made of: the values of JSON texts, and the names that people give to columns, splits and roles."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


class Number(str):
    """A number as the JSON text writes it."""

    __repr__ = str.__str__


SPLIT_NAMES = {"train": "train", "training": "train", "test": "test",
               **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val")}
QUESTIONS = ("instruction", "prompt", "question", "query", "inputs", "problem", "human", "user", "message_1", "input")
TALKS = ("messages", "conversations", "conversation")
ROLES = ("role", "from", "speaker", "sender")  # who says a message
ANSWERS = ("output", "response", "completion", "solution", "answer", "targets", "target", "assistant", "message_2")
# The names of a column of each meaning, the likelier first, in any case
NAMES = {
    "messages": TALKS,
    "instruction": QUESTIONS,
    "output": ANSWERS,
    "input": ("input", "context"),
    "system": ("system_prompt",),
    "split": ("split",),
}
MESSAGES_TOO = ("dialogue", "dialog", "chat", "turns", "data", "contents")  # in a row without question and answer
_JSON = json.JSONDecoder(parse_int=Number, parse_float=Number,
                         parse_constant=lambda name: None if name == "NaN" else Number(name))
_VALUE = re.compile(r"[^ \t\r\n]")  # where a value begins


class BadRow(Exception):
    """Yielded, one row that cannot be used: it can be skipped. Raised in here, a file whose structure is broken."""

    advice = " (--skip_bad drops such rows)"


class BadSplit(BadRow):
    """Dropping such rows could drop a whole split."""

    advice = "; --columns split= ignores that column"


def parse_json(text: str, is_one: bool = True) -> Any:
    """The value of a JSON text, or a list of all that stand in it one after another; or a BadRow. Numbers stay as they
    are written, NaN is null."""
    values, end = list[Any](), 0
    try:
        if is_one:
            return _JSON.decode(text)
        while begin := _VALUE.search(text, end):
            value, end = _JSON.raw_decode(text, begin.start())
            values.append(value)
        return values
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " * ("\n" in text)
        return BadRow(f"cannot be read as JSON: {error.msg}: {line}column {error.colno}")


def parse_list(text: str) -> Any:
    """The list that a text is, as JSON writes it, or Python, as pandas has it in CSV; or the text itself."""
    value, text = parse_json(text), text.strip()
    if text.startswith(("[{'", "['")):
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its escapes
            value = parse_json(json.dumps(ast.literal_eval(text)))
    return value if isinstance(value, list) else text


def plain(name: object) -> str:
    """The name of a column or role without what people add to it: blanks, capitals, the mark of a file's beginning."""
    return str(name).replace("\ufeff", "").strip().lower()


def split_of(name: str) -> str | None:
    """The split that a name such as Train, validation or test_sft means."""
    return SPLIT_NAMES.get(plain(name).split("_")[0])


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether its names are those of a question and its answer."""
    names = {*map(plain, row)}
    return bool(names & {*QUESTIONS} and names & {*ANSWERS})


def is_talk(value: Any) -> bool:
    """Whether it is a list of messages with roles."""
    return isinstance(value, list) and isinstance(first := next(iter(value), None), dict) and bool(
        {*map(plain, first)} & {*ROLES})
