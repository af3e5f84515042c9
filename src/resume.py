"""Going on with a run: the checkpoint to resume from, what it must hold, and putting the run where it left off."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import checkpoint
from cli import CheckpointError, UserError, printable_line, unread_output
from dataloader_instruct import Position
from train_options import option_table, parse_options

if TYPE_CHECKING:
    from training_run import Run

# What the state of a run has besides what every checkpoint has, and how a usable value is told: a forged file has a
# fitting checksum too. The name becomes a folder's.
_RUN_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: 0 <= value < 2**31,
    "position": lambda value: isinstance(value, list) and len(value) == 2 and all(
        type(part) is int and 0 <= part < 2**31 for part in value),
    "skipped": lambda value: type(value) is int,
    "name": lambda value: isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value, re.ASCII) is not None,
    "options": lambda value: isinstance(value, dict) and _can_be_given(value),
    "data_fingerprint": lambda value: isinstance(value, str),
    "optimizer": lambda value: isinstance(value, dict),
}


def _can_be_given(options: dict[str, Any]) -> bool:
    """Whether each option of a checkpoint is one that the command line takes."""
    known = {name: options[name] for name in option_table().defaults if options.get(name) is not None}
    try:
        parsed = vars(parse_options([f"--{name}={value}" for name, value in known.items() if name != "device"]))
    except UserError:
        return False
    return all(parsed[name] == value and type(parsed[name]) is type(value) for name, value in known.items())


def state_to_resume(given: Namespace, folder: Path, is_main: bool) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint to go on from, or None for a new run, which must not overwrite an old one."""
    resume, pretrained = given.resume, Path()
    there = [path for path in (folder / checkpoint.LATEST, folder / checkpoint.BEST) if path.exists()]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (folder / checkpoint.LATEST).exists():
        resume = "latest"  # torchrun started the processes again because one of them died
    if resume is None:
        if there:
            raise UserError(f"{there[0]}: a run is here already; --resume latest goes on with it, another "
                            "--checkpoint_dir starts a new one")
        return pretrained, None
    if resume == "latest":
        path, state = checkpoint.newest_valid(folder, _tell if is_main else lambda _: None)
    else:
        path, state = Path(resume), checkpoint.load(Path(resume))
    if "optimizer" not in state:
        raise UserError(f"{path}: weights only, not the state of a run; --pretrained_model {path} starts from it")
    wrong = [name for name, is_right in _RUN_FIELDS.items() if not is_right(state.get(name))]
    if wrong:
        raise CheckpointError(f"{path}: not a complete state of a run: {', '.join(wrong)} missing or not usable")
    return path, state


def _tell(text: str) -> None:
    with unread_output():
        print(printable_line(text), flush=True)


def follow(run: Run) -> UserError | None:
    """Make latest.pt the file in the run's folder that it was resumed from: what a restart of the processes goes on
    from. Returns what went wrong."""
    if run.processes.is_main and run.saved and run.saved.parent.samefile(run.folder):
        try:
            checkpoint.point_latest(run.saved, run.state())
        except UserError as error:
            return error
    return None


def restore(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put the run where the checkpoint left it."""
    try:
        groups = run.optimizer.state_dict()["param_groups"]  # ours: a checkpoint adds the moments alone
        if [group["params"] for group in state["optimizer"]["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("its parameters are grouped otherwise")
        run.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        _check_moments(run.optimizer, may_be_absent=state["step"] == state["skipped"])
        run.position = Position(*state["position"])
        if run.position.index > len(run.data["train"]):
            raise ValueError(f"position {run.position.index} of {len(run.data['train'])} examples")
        run.step, run.skipped, run.name = state["step"], state["skipped"], state["name"]
        run.val_losses = [list(entry) for entry in state["val_losses"]]
        run.saved = path
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a complete state of a run ({error!r})") from error


def _check_moments(optimizer: torch.optim.AdamW, may_be_absent: bool) -> None:
    """Raise ValueError unless each parameter has moments of its shape: fused AdamW does not look, and would read and
    write beyond them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            shapes = {name: getattr(moments.get(name), "shape", None) for name in ("step", "exp_avg", "exp_avg_sq")}
            if (moments or not may_be_absent) and shapes != {
                    "step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                raise ValueError("the optimizer's moments do not fit the parameters")
