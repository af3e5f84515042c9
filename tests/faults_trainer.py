"""The trainer, stopped for a while at a chosen point, or fed a NaN: src/train_instruct.py with a few functions wrapped.

    FAULT='{"phase": "save", "at": 2, "seconds": 0.7, "marker": "/tmp/x"}' python tests/faults_trainer.py [flags...]

At its at-th visit of the phase a process writes MARKER.RANK and sleeps. {"nan": [5, 6], "rank": 1, "marker": ...}
makes that rank's loss NaN in those steps, and every rank writes a hash of its weights to MARKER.RANK after each step.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAULT = json.loads(os.environ.get("FAULT", "{}"))
RANK = os.environ.get("RANK", "0")
sys.path.insert(0, os.environ.get("FAULT_SRC", str(Path(__file__).resolve().parent.parent / "src")))

import train_instruct  # noqa: E402
from cli import run  # noqa: E402

visits = {"count": 0, "micro_batches": 0, "in": ""}


def visit(phase: str) -> None:
    if phase != FAULT.get("phase"):
        return
    visits["count"] += 1
    if visits["count"] == FAULT["at"]:
        Path(f"{FAULT['marker']}.{RANK}").touch()
        time.sleep(FAULT["seconds"])


def wrapped(module: Any, name: str, phase: str) -> None:
    real = getattr(module, name)

    def function(*arguments: Any, **keywords: Any) -> Any:
        visits["in"], visits["micro_batches"] = phase, 0
        visit(phase)
        return real(*arguments, **keywords)

    setattr(module, name, function)


def stop_at_phases() -> None:
    import checkpoint
    import training_run
    from dataloader_instruct import InstructData

    micro_batch, generate = InstructData.micro_batch, training_run.generate

    def counted(*arguments: Any) -> Any:
        visits["micro_batches"] += 1
        if visits["micro_batches"] == 2:
            visit({"step": "accumulation", "an evaluation": "evaluation"}[visits["in"]])
        return micro_batch(*arguments)

    def slow_answer(*arguments: Any, **keywords: Any) -> Any:
        for token in generate(*arguments, **keywords):
            yield token
            visit("sampling")

    wrapped(training_run, "train_step", "step")
    wrapped(training_run, "evaluate", "an evaluation")
    wrapped(checkpoint, "seal", "save")  # everything is written, nothing renamed
    InstructData.micro_batch = counted  # type: ignore[method-assign]
    training_run.generate = slow_answer  # type: ignore[attr-defined]


def feed_nan() -> None:
    import train_step
    import training_run

    real_step, real_loss, current = training_run.train_step, train_step.F.linear_cross_entropy, {"step": 0}

    def loss(*arguments: Any, **keywords: Any) -> Any:
        bad = current["step"] in FAULT["nan"] and int(RANK) == FAULT["rank"]
        return real_loss(*arguments, **keywords) * (float("nan") if bad else 1.0)

    def step(loss_of: Any, optimizer: Any, data: Any, stream: Any, position: Any, number: int, *rest: Any) -> Any:
        current["step"] = number + 1
        result = real_step(loss_of, optimizer, data, stream, position, number, *rest)
        digest = hashlib.sha256()
        for parameter in loss_of.parameters():
            for tensor in (parameter, *optimizer.state[parameter].values()):
                digest.update(tensor.detach().numpy().tobytes())
        with Path(f"{FAULT['marker']}.{RANK}").open("a") as file:
            file.write(f"{number + 1} {digest.hexdigest()}\n")
        return result

    train_step.F.linear_cross_entropy = loss
    training_run.train_step = step  # type: ignore[assignment]


def prepared_hold(hold: Any = train_instruct.hold_signals) -> None:
    """In place of hold_signals: the trainer's own imports come after it, so it is the first moment to wrap them."""
    hold()
    if "phase" in FAULT:
        stop_at_phases()
    if "nan" in FAULT:
        feed_nan()


if __name__ == "__main__":
    train_instruct.hold_signals = prepared_hold
    run(train_instruct.main)
