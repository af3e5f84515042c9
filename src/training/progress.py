"""What a training run shows: the banner, one line or a progress bar, TensorBoard."""

import math
import os
import sys
import threading
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cli import printable, printable_line, unread_output
from dataloader_instruct import InstructData, Plan
from errors import errors_at
from model import GPT
from training.processes import Processes
from training.step import StepResult


def banner(options: Namespace, processes: Processes, model: GPT, data: dict[str, InstructData], origin: str) -> str:
    """What the run is, a line each. origin says where the weights come from."""
    tokens, examples = int(data["train"].lengths.sum()), len(data["train"])
    steps_per_epoch = tokens / (options.total_batch_size * 127 // 128)
    longer = ", ".join(f"{split.left_out} {name}" for name, split in data.items() if split.left_out)
    lines = {
        "model": f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, context_length "
                 f"{options.context_length}, {origin}",
        "device": f"{processes.device.type}, {processes.world_size} process" + "es" * (processes.world_size > 1),
        "data": f"{examples:,} train and {len(data['val']):,} val examples, {tokens:,} train tokens"
                + f"; left out, longer than context_length: {longer}" * bool(longer),
        "step": f"{options.total_batch_size:,} tokens, micro-batches of at most "
                f"{options.mini_batch_size * options.context_length:,}",
        "epoch": f"about {steps_per_epoch:,.1f} steps",
        "run": f"{options.max_steps:,} steps = {options.max_steps / steps_per_epoch:.2f} epochs",
    }
    return "\n".join(f"{name:<7} {printable_line(text)}" for name, text in lines.items())


def say(text: str) -> None:
    """Print a line on the main process, without breaking a progress bar."""
    if os.environ.get("RANK", "0") != "0":
        return
    with unread_output():
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """Shows steps and evaluations on the terminal (a bar), in a pipe or file (lines), and in TensorBoard."""

    def __init__(self, options: Namespace, folder: Path, step: int, val_loss: float | None) -> None:
        self.options = options
        self.folder = folder
        with errors_at(f"{folder}: cannot write there"):
            # After a kill the log may hold steps that are now done again: TensorBoard drops those from step + 1 on.
            self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=step + 1)
        self.thread_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.bar = tqdm(total=options.max_steps, initial=step, unit=" steps", disable=None)
        self.seconds, self.tokens, self.response_tokens, self.steps = 0.0, 0, 0, 0
        self.val_loss = "-" if val_loss is None else f"{val_loss:.4f}"  # the last one

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """What TensorBoard's writing thread raises reaches _log as well, so it is not shown twice."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.thread_hook(failure)

    def _log(self, method: str, *arguments: object) -> None:
        """Call a method of TensorBoard's writer. A log that cannot be written is no reason to lose a run."""
        try:
            if self.writer:
                getattr(self.writer, method)(*arguments)
        except OSError as error:
            self.writer = None
            say(f"warning: {self.folder}: cannot write the log: {error.strerror or error}; the run goes on without it")

    def step(self, step: int, result: StepResult, plan: Plan, epoch: float, seconds: float) -> None:
        """Show optimizer step number step (the first is 1), which took this long."""
        self.seconds, self.tokens, self.steps = self.seconds + seconds, self.tokens + plan.tokens, self.steps + 1
        self.response_tokens += plan.response_tokens
        scalars = {"train/loss": result.loss, "learning_rate": result.learning_rate, "epoch": epoch,
                   "gradient_norm": result.gradient_norm, "tokens_per_second": plan.tokens / seconds}
        for tag, value in scalars.items():
            self._log("add_scalar", tag, value, step)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {result.loss:.4f}, val loss {self.val_loss}, "
                                 f"{plan.tokens / seconds:,.0f} tokens/s")
        if self.bar.disable and (step % self.options.log_freq == 0 or step == self.options.max_steps):
            left = timedelta(seconds=round((self.options.max_steps - step) * self.seconds / self.steps))
            say(f"step {step}/{self.options.max_steps} loss {result.loss:.4f} val_loss {self.val_loss} "
                f"lr {result.learning_rate:.3e} gradient_norm {result.gradient_norm:.3f} tokens/s "
                f"{self.tokens / self.seconds:,.0f} response_tokens/s {self.response_tokens / self.seconds:,.0f} "
                f"epoch {epoch:.3f} ETA {left}")
            self.seconds, self.tokens, self.response_tokens, self.steps = 0.0, 0, 0, 0

    def evaluation(self, step: int, loss: float, answers: list[str]) -> None:
        self.val_loss = f"{loss:.4f}"
        blocks = ["\n".join("    " + line for line in printable(answer).splitlines()) for answer in answers]
        self._log("add_scalar", "val/loss", loss, step)
        self._log("add_scalar", "val/perplexity", math.exp(min(loss, 700.0)), step)
        self._log("add_text", "val/answers", "\n\n---\n\n".join(blocks), step)
        say(f"step {step}: val loss {loss:.4f}, perplexity {math.exp(min(loss, 700.0)):.2f}")

    def flush(self) -> None:
        """Before a checkpoint: what the log lacks after a kill is then never older than the checkpoint."""
        self._log("flush")

    def close(self) -> None:
        self.bar.close()
        self._log("close")
        threading.excepthook = self.thread_hook
