"""How a run is stopped and how its processes leave: signals, and the exit code that they agree on. No torch in here."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what a training process acts on
EXIT_CODE_FILE = "INSTRUCT_EXIT_CODE_FILE"  # environment: where launch.py wants the exit code of the run


def block_signals() -> None:
    """Keep the watched signals pending, in this thread and in all threads and processes that it starts, until
    somebody takes them: none is lost, and none ends a process that is not ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)


def decide(code: int) -> bool:
    """Under launch.py, leave the code that the whole run is to end with, so that torchrun's restarts do nothing."""
    if EXIT_CODE_FILE not in os.environ:
        return False
    Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))
    return True


def is_decided() -> bool:
    return os.path.exists(os.environ.get(EXIT_CODE_FILE, ""))


def is_restart() -> bool:
    """Whether torchrun started this process again because one of the run died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def leave(code: int) -> NoReturn:
    """End a training process. As one of torchrun's it ends well and leaves its code to launch.py, so that torchrun does
    not try again; only after a bug (1) torchrun does. It skips the interpreter's own end, which may wait forever for
    gloo's threads; see processes.py."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(0 if code > 1 and decide(code) or is_decided() else code)


class Signals:
    """What SIGINT, SIGTERM and SIGUSR1 asked of this process. The handler sets a flag and nothing else; only a second
    SIGINT or SIGTERM, a second or more after the first, leaves at once (checkpoints on disk are whole at any time)."""

    def __init__(self) -> None:
        self.stop = 0  # the signal's number
        self.save = 0
        self._first = 0.0

    def watch(self) -> None:
        """From now on; signals that were blocked until now count too."""
        for number in WATCHED_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = 1
        elif is_decided():  # another rank has left; this signal is torchrun's
            os._exit(128 + number)
        elif not self.stop:
            self.stop, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= 1.0:
            decide(128 + number)
            os._exit(128 + number)
