"""The command line: flags, text that is safe to print, and how a script ends. For scripts, flag tables and printers."""

import argparse
import errno
import os
import re
import stat
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

from errors import LostError, UserError

# Control characters other than tab and newline, marks that reorder text on a terminal, and characters that hide in it.
# The joiners U+200C and U+200D stay: emoji and several scripts need them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                     "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")

_OF_OUTPUT = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT)  # what a stream may refuse; files say their names
_OF_NAMES = (errno.EACCES, errno.ENAMETOOLONG)  # what asking whether a file is there may find


def printable(text: str) -> str:
    """Return text with control characters written as escapes such as \\x1b, so that no terminal obeys them."""
    return _UNSAFE.sub(lambda match: ascii(match.group())[1:-1], text)


def printable_line(text: object) -> str:
    """Like printable, on one line: newlines and tabs are written as escapes too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


class _Help(argparse.HelpFormatter):
    """Says the default of each flag that has one, unless its text does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS)
        is_said = "default: " in (action.help or "")
        return f"{action.help}{' (default: %(default)s)' * (has_default and not is_said)}"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, whose help names all defaults, and whose flags cannot be abbreviated."""

    def __init__(self, description: str | None = None, **arguments: Any) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, **arguments)

    def error(self, message: str) -> NoReturn:
        more, unknown = "", re.match(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("-"):
            more = "".join(f"did you mean {name}? " for name in get_close_matches(
                unknown[1].partition("=")[0], self._option_string_actions, 1, 0.75))
        elif unknown and self.usage:
            more = "words without -- come first; "
        raise UserError(f"{message} ({more}--help lists the flags)")


def number(kind: Callable[[str], float], low: float, high: float = float("inf"), *,
           above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite number of this kind in [low, high], or in (low, high] with above."""

    def parse(text: str) -> float:
        value = kind(text)
        if value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not low <= value <= high or (above and value == low):
            bound = f"{'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < float("inf"))
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def usable_cpus() -> int:
    """How many this process may use: a job or a container (by cgroup v2) may leave it few."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max" where there is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cpus = min(cpus, max(1, quota // period))
    return cpus


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """Return an argparse type: a text that matches a regular expression."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return text

    return parse


def write(text: str, stream: TextIO, *, may_be_lost: bool = False) -> None:
    """Write and flush. Where that is impossible, all that comes later goes nowhere, and the program leaves when it was
    standard output, and the text may not be lost."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if stream is sys.stdout and not may_be_lost:
            raise SystemExit(_end_of_output(error)) from error
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_of_output(error: OSError) -> int:
    """Send standard output nowhere from now on. Returns the exit code: 0 when its reader has left, a terminal is gone
    for instance; else it is said why."""
    is_terminal = stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE or (error.errno == errno.EIO and is_terminal):
        return 0
    write(f"error: standard output: {error.strerror}\n", sys.stderr)
    return UserError.exit_code


_COMMAND = re.compile(r"(?:^|\s)(?:\./\w+\.sh|\S*python[\d.]* src/)")


def fill(text: str, indent: int = 2) -> str:
    """A line, on a terminal wrapped to its width, with an indent from the second on. One with a command to copy is left
    to the terminal."""
    width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    return textwrap.fill(text, max(width, indent + 20), subsequent_indent=" " * indent, break_long_words=False,
                         break_on_hyphens=False) if 0 < width < len(text) and not _COMMAND.search(text) else text


def say(text: str) -> None:
    """Print lines of a program that goes on whatever becomes of its output."""
    write("\n".join(map(fill, printable(text).split("\n"))) + "\n", sys.stdout, may_be_lost=True)


def _says_it() -> bool:
    """Whether this process is the one of its machine that shows an error: under the launcher the first to get there."""
    try:
        with open(os.environ["INSTRUCT_SAID"], "x"):
            return True
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return os.environ.get("LOCAL_RANK", "0") == "0"


def _refuse(error: UserError) -> int:
    # the launcher has seen who died, and says it
    is_known = isinstance(error, LostError) and os.path.exists(f"{os.environ.get('INSTRUCT_SAID')}.died")
    if not is_known and _says_it():
        write(f"error: {printable_line(error)}\n", sys.stderr)
    return error.exit_code


def _explain(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What ends a script while it is still importing: a package that is not there, or Ctrl-C."""
    def again() -> NoReturn:
        raise error

    if isinstance(error, (ModuleNotFoundError, KeyboardInterrupt)):
        run(again)
    sys.__excepthook__(kind, error, trace)


def _lacks_package(error: Exception) -> bool:
    """Whether this is an import of what is none of our modules."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return bool(name) and not any(Path(__file__).parent.glob(f"{str(name).partition('.')[0]}*"))


sys.excepthook = _explain


def _mend_streams() -> None:
    """Streams that were closed before the start are empty. Bytes that are no text are replaced, and characters that an
    encoding lacks are escapes."""
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode)  # noqa: SIM115 (for as long as the process lives)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def run(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a script's main, turn its errors into one line and an exit code, and leave with that."""
    code = 0
    _mend_streams()
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        code = _refuse(error)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _OF_OUTPUT:  # of print
            code = _end_of_output(error)
        elif isinstance(error, OSError) and error.filename is not None and error.errno in _OF_NAMES:
            code = _refuse(UserError(f"{error.filename}: {error.strerror}"))
        elif _lacks_package(error):
            code = _refuse(UserError(
                f"{sys.executable} has no package {error.name}; use the Python of an environment with the "  # type: ignore
                "requirements (source .venv/bin/activate), or: pip install -r requirements.txt"))
        else:
            traceback.print_exc()
            code = 1
    leave(code)
