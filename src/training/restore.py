"""A run put back where a checkpoint left it."""

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from dataloader_instruct import Position
from errors import CheckpointError, UserError, errors_at
from training.processes import less_memory
from training.run import Run
from training.step import HIGHEST_SCALE
from weights import checkpoint


def restore(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put the run where the checkpoint left it."""
    optimizer = run.learner.optimizer
    with errors_at(f"{path}: not a complete state of a run", LookupError, TypeError, ValueError, AttributeError,
                   RuntimeError, raised=CheckpointError), run.processes.failures_explained(less_memory(run.options)):
        groups = optimizer.state_dict()["param_groups"]  # ours: a checkpoint adds the moments alone
        if [group["params"] for group in state["optimizer"]["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("its parameters are grouped otherwise")
        moments = deepcopy(state["optimizer"]["state"])  # the file's memory is for reading
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        _check_moments(optimizer, may_be_absent=state["step"] == state["skipped"])
        if state["position"][1] > len(run.data["train"]):
            raise ValueError(f"position {state['position'][1]} of {len(run.data['train'])} examples")
        run.learner.set_loss_scale(state.get("loss_scale", HIGHEST_SCALE))
    run.position = Position(*state["position"])
    run.step, run.skipped, run.saved = state["step"], state["skipped"], path
    origin = Path(str(state["options"].get("checkpoint_dir")))
    is_copy = os.path.exists(origin) and not origin.samefile(path.parent)
    if run.folder.exists() and path.parent.samefile(run.folder) and not is_copy:  # else the other run keeps its log
        run.name = state["name"]
    run.val_losses = [list(entry) for entry in state["val_losses"]]


def find_best(run: Run) -> None:
    """Find the lowest val loss, of the run or of best_model.pt, which may come from a branch that was left, and whether
    a kill between a save and best_model.pt has left that to be written: the state of that step has its weights."""
    path, file_loss, is_damaged = run.folder / checkpoint.BEST, math.inf, False
    if run.processes.is_main and path.exists():
        try:
            losses = checkpoint.load(path)["val_losses"]
            file_loss = min((loss for step, loss in losses if step), default=math.inf)
        except UserError:
            is_damaged = True
    file_loss, is_damaged = run.processes.gather([file_loss, is_damaged])[0]
    best_step, best_loss = run.best() or (-1, math.inf)
    run.has_best = best_step != run.step or best_loss >= file_loss
    run.best_loss = math.inf if is_damaged and run.has_best else min(best_loss, file_loss)


def _check_moments(optimizer: torch.optim.AdamW, may_be_absent: bool) -> None:
    """Raise ValueError unless each parameter has moments of its shape: fused AdamW does not look, and would read and
    write beyond them."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = optimizer.state.get(parameter, {})
        forms = [(moments[name].shape, moments[name].stride()) for name in ("step", "exp_avg", "exp_avg_sq") if moments]
        if forms != [(torch.Size(), ()), *[(parameter.shape, parameter.stride())] * 2] and (forms or not may_be_absent):
            raise ValueError("the optimizer's moments do not fit the parameters")
