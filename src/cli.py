"""The command line: flags, text that is safe to print, and how a script ends. For scripts, flag tables and printers."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from errors import UserError

# Control characters other than tab and newline, marks that reorder text on a terminal, and characters that hide in it.
# The joiners U+200C and U+200D stay: emoji and several scripts need them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                     "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")


def printable(text: str) -> str:
    """Return text with control characters written as escapes such as \\x1b, so that no terminal obeys them."""
    return _UNSAFE.sub(lambda match: ascii(match.group())[1:-1], text)


def printable_line(text: object) -> str:
    """Like printable, on one line: newlines and tabs are written as escapes too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and whose flags cannot be abbreviated."""

    def __init__(self, description: str | None = None, **arguments: Any) -> None:
        super().__init__(description=description, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: Callable[[str], float], low: float, high: float = float("inf"), *,
           above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite number of this kind in [low, high], or in (low, high] with above."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low) or value == float("inf"):
            bound = f"{'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < float("inf"))
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


@contextmanager
def unread_output() -> Iterator[None]:
    """What is printed in here may go unread: when the reader of a pipe has left, it goes nowhere from now on."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a script's main, turn its errors into one line and an exit code, and leave with that."""
    code = 0
    try:
        with unread_output():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        code = error.exit_code
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process a machine says so
            print(f"error: {printable_line(error)}", file=sys.stderr, flush=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
