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
from pkgutil import resolve_name
from typing import Any
from unittest import mock

FAULT = json.loads(os.environ["FAULT"])
RANK = os.environ.get("RANK", "0")
MARKER = Path(f"{FAULT['marker']}.{RANK}")
PHASES = {"step": "training.loop.train_step", "accumulation": "training.step.Learner.add_gradients",
          "evaluation": "training.step.Learner.loss", "sampling": "answering.batch.Rows.step", "save": "torch.save"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train_instruct  # noqa: E402
from cli import run  # noqa: E402
from training.ending import leave  # noqa: E402

now = {"visits": 0, "step": 0}


def wrap(name: str, instead: Callable) -> None:
    """In the place of the function of this name, call instead with it and its arguments."""
    real = resolve_name(name)
    mock.patch(name, lambda *arguments, **keywords: instead(real, *arguments, **keywords)).start()


def stop(real: Callable, *arguments: Any, **keywords: Any) -> Any:
    is_save = FAULT["phase"] == "save"
    if is_save:
        real(*arguments)  # everything is written, nothing renamed
    now["visits"] += 1
    if now["visits"] == FAULT["at"]:
        MARKER.touch()
        time.sleep(FAULT["seconds"])
    return None if is_save else real(*arguments, **keywords)


def nan_loss(real: Callable, *arguments: Any) -> Any:
    bad = now["step"] in FAULT["nan"] and int(RANK) == FAULT["rank"]
    return real(*arguments) * (float("nan") if bad else 1.0)


def watched_step(real: Callable, learner: Any, *rest: Any) -> Any:
    now["step"] += 1
    result = real(learner, *rest)
    digest = hashlib.sha256()
    for parameter in learner.model.parameters():
        for tensor in (parameter, *learner.optimizer.state[parameter].values()):
            digest.update(tensor.detach().numpy().tobytes())
    with MARKER.open("a") as file:
        file.write(f"{now['step']} {digest.hexdigest()}\n")
    return result


def full_step(real: Callable, *arguments: Any) -> Any:
    now["step"] += 1
    if now["step"] == FAULT["full"] and int(RANK) in FAULT["ranks"]:
        raise sys.modules["torch"].OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMany more lines.")
    return real(*arguments)


def prepared_block(block: Any = train_instruct.block_signals) -> None:
    """In place of block_signals: the trainer's own imports come after it, so it is the first moment to wrap them."""
    block()
    if FAULT.get("dies") == int(RANK) and not MARKER.exists():
        MARKER.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "phase" in FAULT:
        wrap(PHASES[FAULT["phase"]], stop)
    if "nan" in FAULT:
        wrap("training.step.Learner.add_gradients", nan_loss)
        wrap("training.loop.train_step", watched_step)
    if "full" in FAULT:
        wrap("training.loop.train_step", full_step)


if __name__ == "__main__":
    train_instruct.block_signals = prepared_block
    run(train_instruct.main, leave)
