"""How a run is stopped and how its processes leave: signals and exit codes. No torch in here."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NoReturn

AGAIN = signal.SIGUSR2  # from launch.py: save and leave, to be started again together with another host
# What launcher and trainers act on. A SIGHUP that is ignored from the start, by nohup, stays ignored.
WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, AGAIN,
                   *[signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN))


def block_signals() -> None:
    """Keep the watched signals pending, in this thread and in all threads and processes that it starts, until
    somebody takes them: none is lost, and none ends a process that is not ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)


def mark_begun() -> None:
    """The run has begun, or goes on: from now on a start of the launcher goes on from the newest checkpoint, whatever
    it was started with. The launcher sees when that was last."""
    if path := os.environ.get("INSTRUCT_BEGUN"):
        with suppress(OSError):  # somebody has emptied the folder for temporary files
            Path(path).touch()


def leave(code: int) -> NoReturn:
    """End a training process. One of several skips the interpreter's own end, which may wait forever for gloo's
    threads; see processes.py."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


class Signals:
    """What the watched signals asked for: flags that the loop, or the launcher, reads."""

    def __init__(self) -> None:
        self.stop = 0  # the signal's number
        self.save = 0
        self._first = 0.0  # when it came

    def note(self, number: int) -> bool:
        """Whether this signal is the second one to stop, a second or more after the first: then the process has to end
        at once (checkpoints on disk are whole at any time)."""
        if number == signal.SIGUSR1:
            self.save = 1
        elif not self.stop:
            self.stop, self._first = number, time.monotonic()
        elif number not in (AGAIN, signal.SIGHUP):  # to close the terminal is no haste
            return time.monotonic() - self._first >= 1.0
        return False

    def watch(self) -> None:
        """From now on; signals that were blocked until now count too. A thread waits for them, so that the second one
        works while the main thread hangs in a collective or on a GPU, where Python's handlers never run."""
        block_signals()
        Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while True:
            if self.note(number := signal.sigwait(WATCHED_SIGNALS)):
                os._exit(128 + number)
