"""What a training run shows: lines and a progress bar on the terminal, numbers and texts in the log."""

import math
import os
import platform
import resource
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cli
from cli import printable, printable_line
from dataloader_instruct import Plan
from training.checks import MOST_EPOCHS, USUAL_EPOCHS, doubt_about_weights
from training.ending import mark_begun
from training.log import RunLog
from training.options import ON_RESUME
from training.samples import Sample
from training.step import StepResult

FIRST_SECONDS, FIRST_STEPS = 10, 10  # after one or the other the time that a run takes is known well enough to be said
NARROWEST_BAR = 5  # columns


def say(text: str) -> None:
    """Print lines on the main process, without breaking a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        with tqdm.external_write_mode(sys.stdout):
            cli.say(text)


def columns(rows: Mapping[str, str]) -> str:
    """Names and texts side by side."""
    indent = max(map(len, rows)) + 2
    return "\n".join(cli.fill(f"{name:<{indent}}{printable_line(text)}", indent) for name, text in rows.items())


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Shows steps and evaluations on the terminal (a bar), in a pipe or file (lines), and in the log."""

    def __init__(self, options: Namespace, device: torch.device, log: RunLog, step: int,
                 val_loss: float | None) -> None:
        self.options, self.device, self.log = options, device, log
        is_hidden = None if sys.stdout and sys.stdout.isatty() else True  # None: unless stderr is a terminal too
        self.bar = tqdm(total=options.max_steps, initial=step, disable=is_hidden, dynamic_ncols=True,
                        bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")
        self.sums, self.at_line = np.zeros(4), np.zeros(4)  # seconds, tokens, response_tokens, steps; at the last line
        self.is_time_said, self.is_compiling = False, options.compile == "on"  # in the first step
        self.loss, self.rate, self.val_loss = "-", "-", "-" if val_loss is None else f"{val_loss:.4f}"

    def about(self, manifest: Mapping[str, Any], lengths: np.ndarray) -> None:
        """Log once what the run is: its command, options, versions and data."""
        if not self.log.is_new:
            return
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        lists = {"options": {f"--{name}": getattr(self.options, name) for name in ON_RESUME},
                 "versions": versions, "data": {name: value for name, value in manifest.items() if name != "shards"}}
        texts = ["\n".join(f"{name} {value}" for name, value in texts.items()) for texts in lists.values()]
        self.log.table("train/about", 0, [("command", *lists), tuple(map(printable, [shlex.join(sys.argv), *texts]))])
        self.log.histogram("train/example_tokens", lengths)

    def step(self, step: int, result: StepResult, plan: Plan, epoch: float, seconds: float) -> None:
        """Show optimizer step number step (the first is 1), which took this long."""
        mark_begun()
        self.sums += (seconds, plan.tokens, plan.response_tokens, 1)
        rate = plan.tokens / seconds
        self.log.numbers(step, {
            "train/loss": result.loss, "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm, "train/epoch": epoch,
            "train/tokens_per_second": rate, "train/data_wait": result.data_wait,
            "train/memory_gb": memory_gb(self.device)})
        self._say_time(step, epoch)
        self.loss, self.rate = f"{result.loss:.4f}", f"{rate:,.0f}"
        self.bar.update()
        self._show_figures()
        if self.bar.disable and (step % self.options.log_freq == 0 or step == self.options.max_steps):
            seconds, tokens, response_tokens, steps = self.sums - self.at_line
            say(f"step {step}/{self.options.max_steps} loss {self.loss} val_loss {self.val_loss} "
                f"lr {result.learning_rate:.3e} gradient_norm {result.gradient_norm:.3f} tokens/s "
                f"{tokens / seconds:,.0f} response_tokens/s {response_tokens / seconds:,.0f} "
                f"epoch {epoch:.3f} ETA {duration((self.options.max_steps - step) * seconds / steps)}")
            self.at_line = self.sums.copy()
        if self.is_compiling:  # which says nothing of the other steps
            self.is_compiling, self.sums, self.at_line = False, np.zeros(4), np.zeros(4)

    def _say_time(self, step: int, epoch: float) -> None:
        """Say once how long all steps take, from the first ones."""
        left, (seconds, _, _, steps) = self.options.max_steps - step, self.sums
        if self.is_time_said or self.is_compiling or not left or (seconds < FIRST_SECONDS and steps < FIRST_STEPS):
            return
        self.is_time_said, epochs = True, self.options.max_steps * epoch / step
        usual = f"; {USUAL_EPOCHS} epochs would take {duration(USUAL_EPOCHS * seconds / steps * step / epoch)}"
        say(f"at the pace of the first steps, the {left:,} that are left take {duration(left * seconds / steps)}"
            + usual * (epochs > MOST_EPOCHS and not self.options.from_scratch))

    def _show_figures(self) -> None:
        """Beside the bar: what fits on the terminal's line."""
        if self.bar.disable:
            return
        width = 80
        with suppress(OSError):  # the terminal is gone
            width = os.get_terminal_size(self.bar.fp.fileno()).columns or width
        room = width - len(f"{self.bar.total}/{self.bar.total}  00:00:00 left, ") - NARROWEST_BAR
        figures = [f"loss {self.loss}", f"val {self.val_loss}", f"{self.rate} tok/s"]
        while len(", ".join(figures)) > room and figures:
            figures.pop()
        self.bar.set_postfix_str(", ".join(figures))

    def evaluation(self, step: int, loss: float, samples: list[Sample]) -> None:
        mark_begun()
        self.val_loss = f"{loss:.4f}"
        numbers = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        if samples:
            numbers["val/ended"] = sum(sample.is_ended for sample in samples) / len(samples)
            heading = ("prompt", "expected answer", f"the model's, at step {step}")
            rows = [(sample.prompt, sample.expected, sample.answer + " [...]" * (not sample.is_ended))
                    for sample in samples]
            self.log.table("val/answers", step, [heading, *(tuple(map(printable, row)) for row in rows)])
        self.log.numbers(step, numbers)
        say(f"step {step}: val loss {self.val_loss}, perplexity {numbers['val/perplexity']:.2f}")
        if doubt := "" if step or self.options.from_scratch else doubt_about_weights(loss):
            say(f"warning: {doubt}")
        self._show_figures()

    def close(self) -> None:
        self.bar.close()
        self.log.close()


def memory_gb(device: torch.device) -> float:
    """The most memory that this process has had until now: on its GPU, or altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
