"""Our checkpoint, and a run's folder of them.

A checkpoint is what torch.save writes of tensors and plain values. A run's folder has step_NNNNNN.pt files, latest.pt
(a second name of the newest of them) and best_model.pt (the weights of the lowest val loss). What other programs or
people put there is never replaced nor removed, whatever it is called.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from errors import CheckpointError, UserError, errors_at
from model import GPT, GPTConfig
from weights.durable import TEMPORARY_SUFFIX, Say, durable_file, say_nothing, sync_folder
from weights.safe_load import load_any

FORMAT = "gpt2-instruct"
FORMAT_VERSION = 1
LATEST, BEST = "latest.pt", "best_model.pt"
_STEP_FILE = re.compile(r"step_\d{6,}\.pt")


def is_weight(name: object, value: object) -> bool:
    """Whether this is a named dense tensor that holds all its elements: a stride of 0 makes terabytes of four bytes."""
    return (isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
            and value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes())


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# What a checkpoint has besides its format, and how a usable value is known: a forged file has fitting checksums too.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "val_losses": lambda value: isinstance(value, list) and all(
        isinstance(entry, list) and list(map(type, entry)) == [int, float] for entry in value),
    "template": _is(str, type(None)),
    "multi_turn": _is(bool),
    "data_source": _is(str),
    "model_config": _is(dict),
    "model": lambda value: isinstance(value, dict) and all(
        is_weight(*item) and item[1].is_floating_point() for item in value.items()),
}
_ABSENT_BEFORE = {"multi_turn": False, "data_source": ""}  # what checkpoints of earlier versions do not have
# And what the state of a run has besides that. Its name becomes a folder's.
_RUN_FIELDS: dict[str, Callable[[Any], bool]] = {
    "position": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    "skipped": _is_count,
    "name": lambda value: isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value, re.ASCII) is not None,
    "options": _is(dict),
    "data_fingerprint": _is(str),
    "optimizer": _is(dict),
}


def save(path: Path, state: Mapping[str, Any], say: Say = say_nothing) -> None:
    """Write state to path durably; say names what is set aside for it. Raises UserError when the disk does not take
    it, or something that is no file has its name."""
    _make_room(path, say)
    with durable_file(path, needed=size_of(state)) as file:
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, file)


def size_of(state: object) -> int:
    """The bytes of the tensors in nested dictionaries. A checkpoint has a few hundred more for each tensor."""
    return sum(each.nbytes for each in tree_leaves(state) if isinstance(each, Tensor))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of ours: its tensors are on the CPU, memory-mapped.

    Raises UserError when there is none, CheckpointError when it is damaged, unsafe, or not of this project.
    """
    return verify(load_any(path), path)


def verify(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The state with every field of this version. Raises CheckpointError when it is not a usable checkpoint of ours."""
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project; --pretrained_model takes weights from "
                              "elsewhere")
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {state.get('format_version')}, this version reads "
                              f"{FORMAT_VERSION}")
    state = {**_ABSENT_BEFORE, **state}
    fields = {**_FIELDS, **_RUN_FIELDS} if "optimizer" in state else _FIELDS
    wrong = [name for name, is_usable in fields.items() if name not in state or not is_usable(state[name])]
    if wrong:
        raise CheckpointError(f"{path}: not a usable checkpoint: {', '.join(wrong)} missing or of another type")
    return state


def load_run(path: Path) -> dict[str, Any]:
    """Load the state of a run. Raises like load, and UserError for weights alone."""
    state = load(path)
    if "optimizer" not in state:
        raise UserError(f"{path}: weights only, not the state of a run; --pretrained_model {path} starts from it")
    return state


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the weights have exactly the expected names and shapes, and are finite."""
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (list(each[name].shape) if name in each else "absent" for each in (weights, expected))
        if found != wanted:
            more = "; save a GPT-2 alone, without other heads; other models cannot be taken" * (wanted == "absent")
            raise CheckpointError(f"{path}: weights do not fit: {name} is {found}, expected {wanted}{more}")
    for name, tensor in weights.items():
        if not tensor.sum(dtype=torch.float32).isfinite():  # five times as fast as asking each value
            raise CheckpointError(f"{path}: {name} has values that are not finite (NaN or infinite); use another "
                                  "checkpoint")


def model_of(state: Mapping[str, Any], path: Path) -> GPT:
    """The model of a state, on the CPU, for reading: it shares the memory of the weights, which may be a mapped file.
    Raises CheckpointError when config and weights do not fit."""
    weights = state["model"]
    with (errors_at(f"{path}: no usable model configuration", TypeError, ValueError, RuntimeError,
                    raised=CheckpointError), torch.device("meta")):
        config = GPTConfig(**state["model_config"])
        if config.n_layer > len(weights):  # building so many would take for ever
            raise ValueError(f"{len(weights)} weights are too few for {config.n_layer} layers")
        model = GPT(config)
    _check_weights(weights, model.state_dict(), path)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()


def step_files(folder: Path) -> list[Path]:
    """The step_NNNNNN.pt files of a folder, newest (by number) first."""
    found = [path for path in folder.glob("step_*.pt") if _STEP_FILE.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.pt"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def save_step(folder: Path, state: Mapping[str, Any], keep_last: int, say: Say = say_nothing) -> None:
    """Save the run's state as step_NNNNNN.pt, point latest.pt at it, and only then remove older step files, so that
    keep_last stay. Files of higher steps stay too. say that it is saved, and what is set aside for it."""
    path = step_file(folder, state["step"])
    save(path, state, say)
    point_latest(path, say)
    files = [file for file in step_files(folder) if is_ours(file)]
    for old in files[files.index(path) + keep_last:]:
        old.unlink(missing_ok=True)
    sync_folder(folder)
    say(f"saved {path}")


def point_latest(path: Path, say: Say = say_nothing) -> None:
    """Make latest.pt a second name (hard link) of this file of the same folder, or a copy where the file system has no
    hard links. Raises UserError when the disk refuses."""
    latest, temporary = path.with_name(LATEST), path.with_name(LATEST + TEMPORARY_SUFFIX)
    if latest.exists() and latest.samefile(path):  # renaming a file to its other name leaves both
        return
    _make_room(latest, say)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        with path.open("rb") as source, durable_file(latest, path.stat().st_size) as file:
            return shutil.copyfileobj(source, file)
    temporary.replace(latest)
    sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed save left. Only for the process that holds the folder."""
    for name in ("step_*.pt", LATEST, BEST):
        for path in filter(is_ours, folder.glob(name + TEMPORARY_SUFFIX)):
            path.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether this file begins as a checkpoint of ours does. A temporary one may have got no further than its name."""
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        begin = file.read(512)
        return FORMAT.encode() in begin or (not begin and path.suffix == TEMPORARY_SUFFIX)
    return False


def _set_aside(path: Path) -> Path:
    """Give a file a name that means nothing in a run's folder. Returns its new path."""
    names = (path.with_name(f"{path.stem}.abandoned{number}{path.suffix}") for number in count(1))
    return path.rename(next(name for name in names if not os.path.lexists(name)))


def _make_room(path: Path, say: Say) -> None:
    """Set aside the files and links that are not ours and would be replaced by a file of ours. Raises UserError where
    anything else is: renamed, a device or a folder would be missed by whoever uses it."""
    for each in (path, path.with_name(path.name + TEMPORARY_SUFFIX)):
        if os.path.lexists(each) and not is_ours(each):
            if not each.is_symlink() and not each.is_file():
                raise UserError(f"{each}: not a file, so nothing is written there; move it away")
            with errors_at(f"{each}: cannot rename it"):
                say(f"{each} was there: now {_set_aside(each).name}")


def abandon_others(source: Path, step: int, say: Say) -> None:
    """Set aside the step files that are not of the branch of source, which a run goes on from: those beyond its step,
    or, when it has no name of a run's (it was set aside itself, say), all of them."""
    is_known = source.name == LATEST or _STEP_FILE.fullmatch(source.name)
    for path in step_files(source.parent):
        if (step_of(path) > step or not is_known) and is_ours(path):
            say(f"{path} is not what led to {source.name} at step {step}; it is now {_set_aside(path).name}")
    sync_folder(source.parent)


def require_no_run(folder: Path) -> None:
    """Raise UserError where a run is already, or files that a new one would mix with its own."""
    for path in (folder / LATEST, *step_files(folder), folder / BEST):
        if os.path.lexists(path):
            advice = "" if path.name == BEST else "--resume latest (or auto) goes on with it, "
            raise UserError(f"{path}: a run is here already; {advice}another --checkpoint_dir starts a new one")


def newest_valid(folder: Path, say: Say) -> tuple[Path, dict[str, Any]]:
    """The newest state of a run in a folder that loads, latest.pt first; say names each one that does not.

    Raises UserError when there is none at all, CheckpointError when none is valid.
    """
    candidates = [path for path in (folder / LATEST, *step_files(folder)) if path.exists()]
    if not candidates:
        raise UserError(f"{folder}: no checkpoint to resume from (no {LATEST}, no step_NNNNNN.pt); without --resume, "
                        "or with auto, a run starts" + ", in another --checkpoint_dir" * (folder / BEST).exists())
    for path in candidates:
        with suppress(CheckpointError):
            return path, load_run(path)
        say(f"skipped {path}: damaged or not loadable")
    raise CheckpointError(f"{folder}: none of its {len(candidates)} checkpoints is valid; copy them again, or "
                          "move them away and start anew")
