"""What torch.save wrote, by whatever program: checked for damage, and loaded without running any of it.

A file of torch.save is a zip with a CRC-32 for each entry, so damage shows, in files of other programs too. It is
loaded with weights_only=True, and the few classes that other trainers pickle along (a config dataclass, numpy arrays)
become inert objects. So nothing in a file is ever executed, forged or not. Files from before PyTorch 1.6 are loaded as
safely, but have no checksums: damage to their weights shows only where it leaves a value that is not finite.
"""

import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any

import torch

from errors import CheckpointError, UserError, errors_at

# Beside these, any class whose name ends in Config: as inert objects they can do nothing either.
_HARMLESS = {"argparse.Namespace", "numpy.ndarray", "numpy.dtype",
             *(f"pathlib{part}.{name}Path" for part in ("", "._local") for name in ("Posix", "Windows")),
             *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar"))}
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save began before PyTorch 1.6
_ADVICE = {  # how files of other programs begin, and what to do with them
    struct.pack("<i", 20240326): "a model file of llm.c; import the folder that its dev/eval/export_hf.py makes of it",
    b"GGUF": "a GGUF file; import the Hugging Face folder or the checkpoint that it was made from",
    b"version https://git-lfs": "a pointer of git LFS, not the file itself; run git lfs pull in its folder",
    b"\x89HDF": "a TensorFlow file; import the weights that PyTorch can read (model.safetensors, pytorch_model.bin)",
}


class _Inert(dict[str, Any]):
    """Stands in for a pickled class or function of another program: it has the fields and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key
    __repr__ = object.__repr__  # of all that is in it, it could be endless

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


def check_is_file(path: Path) -> None:
    """Raise UserError unless path is a regular file: reading a pipe or a device might never end."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file"
                        if path.exists() else f"{path}: no such file")


def begin_of(path: Path) -> bytes:
    """The first bytes of a file. Raises UserError when it is none, CheckpointError with what to do when another program
    wrote it, whatever its name."""
    with errors_at(path):  # what may not be read is not damaged
        check_is_file(path)
        file = path.open("rb")
    with file:
        begin = file.read(64)
    for start, advice in _ADVICE.items():
        if begin.startswith(start):
            raise CheckpointError(f"{path}: {advice}")
    return begin


def load_any(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save, its tensors on the CPU and memory-mapped. Raises UserError when there is
    no such file, CheckpointError when it is damaged, unsafe, or holds something else."""
    # a damaged or hostile file fails anywhere in zip, pickle or tensor code
    with errors_at(f"{path}: not a loadable checkpoint", Exception, raised=CheckpointError):
        if is_zip := not begin_of(path).startswith(_BEFORE_ZIP):
            _check_zip(path)
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        else:
            named = _named_before_zip(path)
        _refuse_unsafe(named, path)
        try:
            with torch.serialization.safe_globals([(_Inert, name) for name in named]):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:  # PyTorch's own words advise to load it unsafely
            raise CheckpointError(f"{path}: refused, it is more than tensors and plain values") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, not a dictionary")
    return state


def _refuse_unsafe(named: set[str], path: Path) -> None:
    """Raise CheckpointError when a file names classes or functions beside the harmless ones."""
    refused = sorted(name for name in named if name not in _HARMLESS and not name.endswith("Config"))
    if any(name.startswith("torch.nn.modules.") for name in refused):
        raise CheckpointError(f"{path}: a whole pickled module, which only code that is not ours could open; in the "
                              "program that made it, save its weights: torch.save(model.state_dict(), ...)")
    if refused:
        raise CheckpointError(f"{path}: refused, it would run code that is not ours: {', '.join(refused)}; in the "
                              "program that made it, save tensors and plain values only")


def _named_before_zip(path: Path) -> set[str]:
    """The classes and functions that the four pickles after the mark of such a file name (version, system, state, keys
    of the storages), without those of PyTorch and OrderedDict: of these, torch.load refuses the unsafe ones itself."""
    with path.open("rb") as file:
        file.seek(len(_BEFORE_ZIP))
        named = {str(argument).replace(" ", ".") for _ in range(4) for code, argument, _ in genops(file)
                 if code.name == "GLOBAL"}
    return {name for name in named if name.startswith("torch.nn.modules.")
            or not name.startswith(("torch.", "collections.OrderedDict", "_codecs.encode"))}


def _check_zip(path: Path) -> None:
    """Refuse a file whose bytes are not those that torch.save wrote, as far as they decide what is loaded."""
    if not zipfile.is_zipfile(path):
        raise ValueError("no file of torch.save, or cut off; name another, or copy it again")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.save stores its tensors as they are: anything else is a zip bomb, or read otherwise by PyTorch.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr for entry in entries):
            raise CheckpointError(f"{path}: refused, torch.save never writes such entries; name a file that it wrote")
        # It writes entry after entry: elsewhere zipfile might check other bytes than PyTorch loads.
        with path.open("rb") as file:
            expected: tuple[int, ...] = (0,)
            places = sorted((entry.header_offset, entry.file_size) for entry in entries)
            for place, size in [*places, (archive.start_dir, 0)]:
                if place not in expected:
                    raise CheckpointError(f"{path}: damaged (its entries are not one after another)")
                file.seek(place + 26)
                end = place + 30 + sum(struct.unpack("<HH", file.read(4))) + size  # header, name, padding, content
                expected = (end + 16, end + 24) if size else (end,)  # the data descriptor of PyTorch's writer
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not fit); use another checkpoint")
