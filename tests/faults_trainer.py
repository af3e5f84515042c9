"""The trainer, stopped for a while at a chosen point, or fed a NaN: src/train_instruct.py with a few functions wrapped.

    FAULT='{"phase": "save", "at": 2, "seconds": 0.7, "marker": "/tmp/x"}' python tests/faults_trainer.py [flags...]

At its at-th visit of the phase a process writes MARKER.RANK and sleeps. {"nan": [5, 6], "rank": 1, "marker": ...}
makes that rank's loss NaN in those steps, and every rank writes a hash of its weights to MARKER.RANK after each step.
{"full": 5, "ranks": [0, 1]} makes the memory of these ranks run out in that step. {"dies": 0} kills that rank of the
first start before it has begun.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT = json.loads(os.environ["FAULT"])
RANK = os.environ.get("RANK", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train_instruct  # noqa: E402
from cli import run  # noqa: E402
from training.ending import leave  # noqa: E402

now = {"visits": 0, "micro_batches": 0, "in": "", "step": 0}


def visit(phase: str) -> None:
    if phase == FAULT["phase"]:
        now["visits"] += 1
        if now["visits"] == FAULT["at"]:
            Path(f"{FAULT['marker']}.{RANK}").touch()
            time.sleep(FAULT["seconds"])


def stop_at_phases() -> None:
    import torch

    from answering.batch import Rows
    from dataloader_instruct import InstructData
    from training import loop

    micro_batch, grow, save = InstructData.micro_batch, Rows.step, torch.save

    def visited(real: Callable, phase: str, inside: str) -> Callable:
        def function(*arguments: Any, **keywords: Any) -> Any:
            now.update({"in": inside, "micro_batches": 0})
            visit(phase)
            return real(*arguments, **keywords)
        return function

    def counted(*arguments: Any) -> Any:
        now["micro_batches"] += 1
        if now["micro_batches"] == 2:
            visit(now["in"])
        return micro_batch(*arguments)

    def slow_answers(*arguments: Any) -> Any:
        visit("sampling")
        return grow(*arguments)

    def slow_save(*arguments: Any) -> None:
        save(*arguments)
        visit("save")  # everything is written, nothing renamed

    loop.train_step = visited(loop.train_step, "step", inside="accumulation")
    loop.evaluate = visited(loop.evaluate, "an evaluation begins", inside="evaluation")
    InstructData.micro_batch, Rows.step, torch.save = counted, slow_answers, slow_save


def feed_nan() -> None:
    from training import loop, step

    real_step, real_loss = loop.train_step, step.Learner.add_gradients

    def loss(*arguments: Any, **keywords: Any) -> Any:
        bad = now["step"] in FAULT["nan"] and int(RANK) == FAULT["rank"]
        return real_loss(*arguments, **keywords) * (float("nan") if bad else 1.0)

    def watched(learner: Any, *rest: Any) -> Any:
        now["step"] += 1
        result = real_step(learner, *rest)
        digest = hashlib.sha256()
        for parameter in learner.model.parameters():
            for tensor in (parameter, *learner.optimizer.state[parameter].values()):
                digest.update(tensor.detach().numpy().tobytes())
        with Path(f"{FAULT['marker']}.{RANK}").open("a") as file:
            file.write(f"{now['step']} {digest.hexdigest()}\n")
        return result

    step.Learner.add_gradients, loop.train_step = loss, watched  # type: ignore[method-assign]


def fill_memory() -> None:
    import torch

    from training import loop

    real_step = loop.train_step

    def step(*arguments: Any) -> Any:
        now["step"] += 1
        if now["step"] == FAULT["full"] and int(RANK) in FAULT["ranks"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMany more lines.")
        return real_step(*arguments)

    loop.train_step = step


def prepared_block(block: Any = train_instruct.block_signals) -> None:
    """In place of block_signals: the trainer's own imports come after it, so it is the first moment to wrap them."""
    block()
    if FAULT.get("dies") == int(RANK) and not os.path.exists(f"{FAULT['marker']}.{RANK}"):
        Path(f"{FAULT['marker']}.{RANK}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "phase" in FAULT or "nan" in FAULT or "full" in FAULT:
        (feed_nan if "nan" in FAULT else fill_memory if "full" in FAULT else stop_at_phases)()


if __name__ == "__main__":
    train_instruct.block_signals = prepared_block
    run(train_instruct.main, leave)
