"""What every script shares at its edge: the errors users see, their exit codes, and text that is safe to print."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER, EXIT_CHECKPOINT, EXIT_DIVERGED = 2, 3, 4
EXIT_CODE_FILE = "INSTRUCT_EXIT_CODE_FILE"  # where launch.py wants the exit code that the trainer decided on

WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what a training process acts on

# Control characters other than tab and newline, marks that reorder text on a terminal, and characters that hide in it.
# The joiners U+200C and U+200D stay: emoji and several scripts need them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                     "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")


class UserError(Exception):
    """The user's input is wrong: a flag, a file, the data, or the arithmetic of a batch. One line, with what to do."""

    exit_code = EXIT_USER


class CheckpointError(UserError):
    """A checkpoint is damaged, unsafe, or does not fit."""

    exit_code = EXIT_CHECKPOINT


class DivergedError(UserError):
    """Loss or gradients are not finite, several steps in a row."""

    exit_code = EXIT_DIVERGED


def printable(text: str) -> str:
    """Return text with control characters written as escapes such as \\x1b, so that no terminal obeys them."""
    return _UNSAFE.sub(lambda match: ascii(match.group())[1:-1], text)


def printable_line(text: object) -> str:
    """Like printable, on one line: newlines and tabs are written as escapes too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def report_error(error: UserError) -> int:
    """Print one line on stderr (one process a machine does) and return the exit code that belongs to the error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {printable_line(error)}", file=sys.stderr, flush=True)
    return error.exit_code


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
        if not (low < value if above else low <= value) or value > high or value in (float("inf"), float("-inf")):
            bound = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}" + (f" and at most {high}" * (high < 1e18)))
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


@contextmanager
def unread_output() -> Iterator[None]:
    """What is printed in here may go unread: when its reader, of a pipe, has left, it goes nowhere from now on."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hold_signals() -> None:
    """Keep the watched signals pending, in this thread and in all threads and processes that it starts, until
    somebody takes them: none is lost, and none ends a process that is not ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)


def leave_with(code: int) -> NoReturn:
    """Leave without the interpreter's own end, which may wait forever for gloo's threads; see processes.py."""
    sys.stdout.flush()
    os._exit(code)


def decide(code: int) -> bool:
    """Under launch.py, leave the code that the whole run is to end with, so that torchrun's restarts do nothing."""
    if EXIT_CODE_FILE not in os.environ:
        return False
    Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))
    return True


def is_decided() -> bool:
    return os.path.exists(os.environ.get(EXIT_CODE_FILE, ""))


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main, turn its errors into one line and an exit code, and leave.

    Under launch.py the code goes to a file and the process ends well, so that torchrun does not try again.
    """
    is_rank = "LOCAL_RANK" in os.environ
    if is_rank and is_decided():
        leave_with(0)  # torchrun started it again, but the run is decided
    code = 0
    try:
        with unread_output():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        code = report_error(error)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except Exception:
        if not is_rank:
            raise
        traceback.print_exc()
        leave_with(1)  # torchrun tries again
    if not is_rank:
        sys.exit(code)
    leave_with(0 if code and decide(code) else code)
