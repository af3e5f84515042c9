"""How an answer is made: one table of settings, each with its default, range and meaning, for flags and for /set."""

from argparse import ArgumentTypeError
from typing import Any, NamedTuple

from cli import Parser, number
from errors import UserError


class Settings(NamedTuple):
    """How long an answer may be, and how its tokens are chosen. Temperature 0 takes the likeliest one; top_k 0, top_p
    1 and repetition_penalty 1 change nothing."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int | None = None

    def room(self, context_length: int) -> int:
        """How many tokens stay free for an answer: its longest, but at most a quarter of the context."""
        return min(self.max_new_tokens, context_length // 4)


def seed(text: str) -> float | None:
    return None if text == "none" else number(int, 0, 2**63 - 1)(text)


# name -> (type with its range, range and meaning)
TABLE: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (number(int, 1), "longest answer; at least 1"),
    "temperature": (number(float, 0), "at least 0, which takes the likeliest every time"),
    "top_k": (number(int, 0), "sample among this many; at least 0, which means all"),
    "top_p": (number(float, 0, 1, above=True), "the likeliest that sum to this; above 0, at most 1"),
    "repetition_penalty": (number(float, 1, 10), "against repeating the last 64 tokens; 1 (off) to 10"),
    "seed": (seed, "same seed, same answer; at least 0, or none: drawn"),
}


def add_flags(parser: Parser, *names: str) -> None:
    """A flag for each of these settings, or for all; its value is an attribute of the same name."""
    for name in names or TABLE:
        kind, meaning = TABLE[name]
        parser.add_argument(f"--{name}", type=kind, default=Settings._field_defaults[name], help=meaning)


def changed(settings: Settings, name: str, text: str) -> Settings:
    """The settings with one of them changed. Raises UserError that names the range when the text is no value for it."""
    kind, meaning = TABLE[name]
    try:
        return settings._replace(**{name: kind(text)})
    except (ArgumentTypeError, ValueError):
        before = str(getattr(settings, name)).lower()  # none, as it is typed
        raise UserError(f"{name} stays {before}: {text!r} is not possible ({meaning})") from None
