"""One checkpoint file: durable save, safe load, validation, the newest valid one, a model from it.

A checkpoint is what torch.save writes (a zip of tensors and plain values), sealed with a checksum; see durable.py.
Whatever the file, nothing in it is ever executed: it is loaded with weights_only=True, and the few classes that other
trainers pickle along (a config dataclass, numpy arrays) become inert objects.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cli import CheckpointError, UserError
from durable import TEMPORARY_SUFFIX, durable_file, is_sealed, seal, sync_folder
from model import GPT, GPTConfig

FORMAT = "gpt2-instruct"
FORMAT_VERSION = 1
LATEST, BEST = "latest.pt", "best_model.pt"
_STEP_FILE = re.compile(r"step_(\d{6,})\.pt")

# What other trainers call the sizes of a model.
_CONFIG_NAMES = {
    "context_length": ("context_length", "block_size", "n_positions", "n_ctx"),
    "vocab_size": ("vocab_size",),
    "n_layer": ("n_layer", "num_layers"),
    "n_head": ("n_head", "num_heads"),
    "n_embd": ("n_embd", "embd_size"),
}
_HARMLESS = {"argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.ndarray", "numpy.dtype",
             *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar"))}


# What every checkpoint of ours has besides its format, and how a value of the right type is told.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int,
    "val_losses": lambda value: isinstance(value, list) and all(
        isinstance(entry, list) and [type(part) for part in entry] == [int, float] for entry in value),
    "template": lambda value: value is None or isinstance(value, str),
    "model_config": lambda value: isinstance(value, dict),
    "model": lambda value: isinstance(value, dict) and all(
        _is_weight(*item) and item[1].is_floating_point() for item in value.items()),
}
_LARGEST_SIZE = 1 << 24  # of anything in a model's configuration: beyond it, only a forged file


def _is_weight(name: object, value: object) -> bool:
    """Whether this is a named dense tensor that holds all its elements: a stride of 0 makes terabytes of four bytes."""
    return (isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
            and value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes())


class _Inert:
    """Stands in for a pickled class or function of another program: it keeps the fields and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write state to path durably, with the checksum that load looks for. Raises UserError when it cannot."""
    with durable_file(path, needed=size_of(state)) as file:
        # From a GPU torch.save writes copies, which are gone when it has written them.
        file.lasting = all(tensor.device.type == "cpu" for tensor in tensors_of(state))
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, file)  # type: ignore[arg-type]
        seal(file)


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def size_of(state: object) -> int:
    """The bytes of the tensors in a state. A checkpoint file has a few hundred more for each tensor."""
    return sum(tensor.nbytes for tensor in tensors_of(state))


def load(path: Path, checked: Future[bool] | None = None) -> dict[str, Any]:
    """Load a checkpoint of ours, memory-mapped, on the CPU. checked is is_sealed(path) where that is under way.

    Raises CheckpointError when the file is damaged, unsafe, or not a checkpoint of this project.
    """
    state, sealed = _load_any(path, checked)
    if not sealed or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project, or damaged (it has no checksum); "
                              "--pretrained_model takes weights from elsewhere")
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {state.get('format_version')}, this version reads "
                              f"{FORMAT_VERSION}")
    wrong = [name for name, is_right in _FIELDS.items() if not is_right(state.get(name))]
    if wrong:
        raise CheckpointError(f"{path}: not a usable checkpoint: {', '.join(wrong)} missing or of another type")
    return state


def _load_any(path: Path, checked: Future[bool] | None = None) -> tuple[dict[str, Any], bool]:
    """Load ours or another program's zip checkpoint; also say whether it carries our checksum, which then fits."""
    try:
        sealed = checked.result() if checked else is_sealed(path)
        _check_zip(path)
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        refused = sorted(name for name in unsafe if name not in _HARMLESS and not name.endswith("Config"))
        if refused:
            raise CheckpointError(f"{path}: refused, it would run code that is not ours: {', '.join(refused)}")
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in unsafe]
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a checkpoint") from None
    except Exception as error:  # a damaged or hostile file fails anywhere in zip, pickle or tensor code
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a loadable checkpoint ({type(error).__name__}: {reason[:200]})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, not a dictionary")
    return state, sealed


def _check_zip(path: Path) -> None:
    """Refuse compressed or overlapping entries: torch.save stores its tensors as they are, so more is a zip bomb."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: refused, it has compressed entries, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: refused, its entries are larger than the file")


def load_pretrained(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration and weights (our names, fp32) of a pre-trained GPT-2.

    Takes a checkpoint of ours, a bare state dict, or {'model': ...} with a config dict or a pickled config dataclass.
    Raises UserError when there is no such file, CheckpointError when it is damaged, unsafe, or no GPT-2.
    """
    state, sealed = _load_any(path)
    if state.get("format") == FORMAT and not sealed:
        raise CheckpointError(f"{path}: damaged (its checksum is gone)")
    found = state.get("model", state)
    if not isinstance(found, Mapping) or not all(_is_weight(*item) for item in found.items()):
        raise CheckpointError(f"{path}: no model weights in it (expected a state dict, or one under 'model')")
    weights = normalize_weights(found, path)
    sizes: object = next((state[key] for key in ("model_config", "model_args", "config") if key in state), {})
    return config_of(sizes, weights, path), weights


def normalize_weights(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring a GPT-2 state dict to our names, layout and fp32.

    Wrapper prefixes and causal-mask buffers go, the tied output matrix goes, Conv1D weights (published GPT-2) are
    transposed, biases that a model was trained without become zeros.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
        if name != "lm_head.weight" and not name.startswith("transformer."):
            name = "transformer." + name
        if not re.search(r"\.attn\.(masked_)?bias$", name):
            weights[name] = tensor.float()
    embedding, output = weights.get("transformer.wte.weight"), weights.pop("lm_head.weight", None)
    if embedding is None:
        raise CheckpointError(f"{path}: no GPT-2 (it has no transformer.wte.weight)")
    if output is not None and not torch.equal(output, embedding):
        raise CheckpointError(f"{path}: lm_head.weight is not the token embedding; GPT-2 ties them")
    first = weights.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.shape == (embedding.shape[1], 3 * embedding.shape[1]):
        for name in [name for name in weights if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)]:
            weights[name] = weights[name].t().contiguous()
    if not any(name.endswith(".bias") for name in weights):
        for name in [name for name in weights if ".ln_" in name or re.search(r"\.c_\w+\.weight$", name)]:
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(weights[name].shape[0])
    return weights


def config_of(sizes: object, weights: Mapping[str, Tensor], path: Path) -> GPTConfig:
    """The model's sizes: what the weights show, and the number of heads, which they do not (default n_embd / 64)."""
    given = sizes if isinstance(sizes, dict) else vars(sizes)
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    shown = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": max(1, n_embd // 64),
             "context_length": weights.get("transformer.wpe.weight", torch.empty(0)).shape[0],
             "n_layer": len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})}
    for field, names in _CONFIG_NAMES.items():
        value = next((given[name] for name in names if name in given), shown[field])
        if field != "n_head" and value != shown[field]:
            raise CheckpointError(f"{path}: its config says {field} {value}, its weights have {shown[field]}")
        shown[field] = value
    try:
        config = GPTConfig(**shown)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_weights(config, weights, path)
    return config


def check_weights(config: GPTConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the weights are exactly those of this configuration, by name and shape."""
    if config.n_layer > len(weights) or max(vars(config).values()) > _LARGEST_SIZE:
        raise CheckpointError(f"{path}: its config does not fit its weights")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"{path}: weights do not fit: {name} is {_shape(found.get(name))}, expected "
                              f"{_shape(expected.get(name))}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1))


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def build_model(config: GPTConfig, weights: Mapping[str, Tensor], device: torch.device) -> GPT:
    """A model of these weights, for reading: on the CPU it shares their memory, which may be a mapped file."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(dict(weights), assign=True)
    return model.to(device).eval()


def model_of(state: dict[str, Any], path: Path, device: torch.device) -> GPT:
    """The model of a loaded checkpoint of ours. Raises CheckpointError when config and weights do not fit."""
    try:
        config = GPTConfig(**state["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no usable model configuration ({error})") from error
    check_weights(config, state.get("model", {}), path)
    return build_model(config, state["model"], device)


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.pt"


def step_files(folder: Path, newest: Path | None = None) -> list[Path]:
    """The step_NNNNNN.pt files of a folder, newest (by number) first, from this one on if it is given."""
    found = [(int(match[1]), path) for path in folder.glob("step_*.pt") if (match := _STEP_FILE.fullmatch(path.name))]
    files = [path for _, path in sorted(found, reverse=True)]
    return files[files.index(newest):] if newest in files else files


def save_step(folder: Path, state: dict[str, Any]) -> Path:
    """Save the run's state as step_NNNNNN.pt and point latest.pt at it: a second name (hard link) of the same file
    where the file system has those, else a copy. settle comes after it."""
    path = step_path(folder, state["step"])
    save(path, state)
    point_latest(path, state)
    return path


def point_latest(path: Path, state: dict[str, Any]) -> None:
    """Make latest.pt of the same folder this file, which holds state. Raises UserError when the disk refuses."""
    latest, temporary = path.with_name(LATEST), path.with_name(LATEST + TEMPORARY_SUFFIX)
    if latest.exists() and latest.samefile(path):  # renaming a file to its other name leaves both
        return
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        save(latest, state)
        return
    try:
        temporary.replace(latest)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{latest}: cannot replace it: {error.strerror or error}") from error


def settle(path: Path, keep_last: int) -> None:
    """Read a new step file back, verify it, and only then remove older ones, so that keep_last stay. Files of higher
    steps stay too: a run that went back has yet to reach them.

    Raises CheckpointError when the file is not what was written or the disk fails.
    """
    try:
        if not is_sealed(path):
            raise CheckpointError(f"{path}: damaged while it was written; the disk may be failing")
        for old in step_files(path.parent, path)[keep_last:]:
            old.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it back or remove older ones: {error.strerror or error}") from error


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed save left. Only for the process that holds the folder."""
    for path in folder.glob("*.pt" + TEMPORARY_SUFFIX):
        path.unlink(missing_ok=True)


def newest_valid(folder: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest training state of a folder that loads, latest.pt first; tell hears of each one that does not.

    Raises UserError when there is none at all, CheckpointError when none is valid.
    """
    candidates = [path for path in (folder / LATEST, *step_files(folder)) if path.exists()]
    if not candidates:
        raise UserError(f"{folder}: no checkpoint to resume from (no {LATEST}, no step_NNNNNN.pt)")
    for path in candidates:
        with suppress(CheckpointError):
            return path, load(path)
        tell(f"skipped {path}: damaged or not loadable")
    raise CheckpointError(f"{folder}: none of its {len(candidates)} checkpoints is valid")
