"""How an answer is made: one table of settings, each with its flag, default, range and meaning."""

from typing import Any, NamedTuple

from cli import Parser, number


class Settings(NamedTuple):
    """How long an answer may be, and how its tokens are chosen. Temperature 0 takes the likeliest one; top_k 0 and
    top_p 1 leave all in."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    seed: int | None = None


# name -> (type with its range, meaning)
TABLE: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (number(int, 1), "longest answer"),
    "temperature": (number(float, 0), "0 takes the likeliest token every time"),
    "top_k": (number(int, 0), "sample among this many; 0 means all"),
    "top_p": (number(float, 0, 1, above=True), "sample among the likeliest that sum to this"),
    "seed": (number(int, 0, 2**63 - 1), "makes the answers reproducible"),
}


def add_flags(parser: Parser) -> None:
    """A flag for each setting; its value is an attribute of the same name."""
    for name, (kind, meaning) in TABLE.items():
        default = Settings._field_defaults[name]
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=meaning + f" (default: {default})" * (default is not None))
