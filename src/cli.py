"""The command line: flags, text that is safe to print, and how a script ends. For scripts, flag tables and printers."""

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

from errors import UserError

if sys.platform == "win32":  # before anything imports what Windows does not have
    print("error: this needs Linux; on Windows use WSL2: wsl --install, then the same in its shell", file=sys.stderr)
    sys.exit(2)

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
def unread_output(*more: int) -> Iterator[None]:
    """What is printed in here may go unread: when the reader of a pipe or the terminal has left (or for one of more
    error numbers) it goes nowhere from now on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO, *more):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _says_it() -> bool:
    """Whether this process is the one of its machine that shows an error: under the launcher the first to get there."""
    try:
        with open(os.environ["INSTRUCT_SAID"], "x"):
            return True
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return os.environ.get("LOCAL_RANK", "0") == "0"


def write(text: str, stream: TextIO) -> None:
    """Write and flush. Where that is impossible, what follows goes nowhere; when it was standard output, the program
    leaves, saying so, or raises BrokenPipeError when the reader has left."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout:
            if isinstance(error, BrokenPipeError):
                raise
            write(f"error: standard output: {error.strerror}\n", sys.stderr)
            raise SystemExit(UserError.exit_code) from error


def _mend_streams() -> None:
    """Streams that were closed before the start are empty, and characters that an encoding lacks are escapes."""
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode)  # noqa: SIM115 (for as long as the process lives)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def run(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a script's main, turn its errors into one line and an exit code, and leave with that."""
    code = 0
    _mend_streams()
    try:
        with unread_output():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        code = error.exit_code
        if _says_it():
            write(f"error: {printable_line(error)}\n", sys.stderr)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
