"""The errors users see: one line each, saying what, where, and what to do next. Each kind has its exit code."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32" or sys.version_info < (3, 10):  # before anything imports what these do not have
    print("error: this needs Python 3.10 and Linux; on Windows use WSL2: wsl --install, then the same in its shell",
          file=sys.stderr)
    sys.exit(2)


def python() -> str:
    """How to call this Python from here: by its path where that lies below, as .venv does; else by its name."""
    with suppress(OSError, ValueError):
        return shlex.quote(str(Path(sys.executable).relative_to(Path.cwd())))
    return Path(sys.executable).name or "python"


class UserError(Exception):
    """The user's input is wrong: a flag, a file, the data, or the arithmetic of a batch."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint is damaged, unsafe, or does not fit."""

    exit_code = 3


class DivergedError(UserError):
    """Loss or gradients are not finite, several steps in a row."""

    exit_code = 4


class DiedError(UserError):
    """A process of the run died, and starting again would only repeat it."""

    exit_code = 1


class LostError(UserError):
    """Another process of the run ended, or the connection to it did. The launcher, which knows more, decides."""

    exit_code = 5


@contextmanager
def errors_at(place: object, *kinds: type[Exception], advice: str = "",
              raised: type[UserError] = UserError) -> Iterator[None]:
    """What the operating system refuses in here, and errors of these kinds, become one that users see: place, reason,
    advice. Those that are one already pass."""
    try:
        yield
    except UserError:
        raise
    except (OSError, *kinds) as error:  # type: ignore[misc]
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        raise raised(f"{place}: {lines[0] if lines else type(error).__name__}{advice}") from error
