"""The log of a run in its folder: TensorBoard's events, and the same numbers as lines of metrics.jsonl.

Everything stands under train/ and val/, the groups that TensorBoard shows first.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from errors import errors_at
from weights.durable import durable_file

METRICS = "metrics.jsonl"


class RunLog:
    """Writes the log of a run that goes on after this step, with evaluations at the steps that are named. A log that
    cannot be written any more is no reason to lose a run: warn says so, once."""

    def __init__(self, folder: Path, step: int, evaluated: Collection[int], warn: Callable[[str], None]) -> None:
        self.folder, self.warn, path = folder, warn, folder / METRICS
        self.is_new, self.has_failed = not path.exists(), False
        # what the disk refuses to TensorBoard's own thread reaches _write as well
        threading.excepthook = lambda failure: (None if issubclass(failure.exc_type, OSError)
                                                else threading.__excepthook__(failure))
        with errors_at(f"{folder}: cannot write there", advice="; choose another --tensorboard_dir"):
            # After a kill the log may hold steps that are now done again: both logs drop those.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)
            if not self.is_new:
                lines = path.read_bytes().splitlines()
                with durable_file(path) as file:
                    file.writelines(line + b"\n" for line in lines if _stays(line, step, evaluated))
            self.metrics = path.open("a", buffering=1)

    def _write(self, write: Callable[..., object], *arguments: object) -> None:
        """Call a method of TensorBoard's writer, or of the file of metrics, unless one has failed."""
        try:
            if not self.has_failed:
                write(*arguments)
        except OSError as error:
            self.has_failed = True
            self.warn(f"warning: {self.folder}: cannot write the log: {error.strerror or error}; the run goes on "
                      "without it")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._write(self.writer.add_scalar, tag, value, step)
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}  # as JSON has it
        self._write(self.metrics.write, json.dumps({"step": step} | finite) + "\n")

    def table(self, tag: str, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Texts side by side; the first row is the heading."""
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        self._write(self.writer.add_text, tag, "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]), step)

    def histogram(self, tag: str, values: np.ndarray) -> None:
        self._write(self.writer.add_histogram, tag, values, 0)

    def flush(self) -> None:
        """Before a checkpoint: what the log lacks after a kill is then never older than the checkpoint."""
        self._write(self.writer.flush)

    def close(self) -> None:
        self._write(self.writer.close)
        self._write(self.metrics.close)


def _stays(line: bytes, step: int, evaluated: Collection[int]) -> bool:
    """Whether a line of metrics is whole and of a step, or an evaluation, that the run has."""
    try:
        values = json.loads(line)
        return values["step"] <= step and ("val/loss" not in values or values["step"] in evaluated)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table: as it is, line by line, whatever Markdown or HTML it looks like."""
    plain = re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match.group())};", text)
    return "<br>".join(re.sub(r"^ +", lambda match: "&nbsp;" * len(match.group()), line) for line in plain.splitlines())
