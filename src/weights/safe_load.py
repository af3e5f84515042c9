"""What torch.save wrote, by whatever program: checked for damage, and loaded without running any of it.

A file of torch.save is a zip with a CRC-32 for each entry, so damage shows, in files of other programs too. It is
loaded with weights_only=True, and the few classes that other trainers pickle along (a config dataclass, numpy arrays)
become inert objects. So nothing that stands in a file is ever executed, not even in one that was forged.
"""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from errors import CheckpointError, UserError, errors_at

# Beside these, any class whose name ends in Config: as inert objects they can do nothing either.
_HARMLESS = {"argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.ndarray", "numpy.dtype",
             *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar"))}


class _Inert:
    """Stands in for a pickled class or function of another program: it keeps the fields and does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


def load_any(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save, its tensors on the CPU and memory-mapped.

    Raises UserError when there is no such file, CheckpointError when it is damaged, unsafe, or holds something else.
    """
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'a folder, not a checkpoint' if path.is_dir() else 'no such file'}")
    # a damaged or hostile file fails anywhere in zip, pickle or tensor code
    with errors_at(f"{path}: not a loadable checkpoint", Exception, raised=CheckpointError):
        _check_zip(path)
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        refused = sorted(name for name in unsafe if name not in _HARMLESS and not name.endswith("Config"))
        if refused:
            raise CheckpointError(f"{path}: refused, it would run code that is not ours: {', '.join(refused)}")
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in unsafe]
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, not a dictionary")
    return state


def _check_zip(path: Path) -> None:
    """Refuse a file whose bytes are not those that torch.save wrote, as far as they decide what is loaded."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.save stores its tensors as they are: anything else is a zip bomb, or read otherwise by PyTorch.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr for entry in entries):
            raise CheckpointError(f"{path}: refused, it has entries that torch.save never writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise CheckpointError(f"{path}: refused, its entries are larger than the file")
        # It writes entry after entry: elsewhere zipfile might check other bytes than PyTorch loads.
        with path.open("rb") as file:
            expected: tuple[int, ...] = (0,)
            places = sorted((entry.header_offset, entry.file_size) for entry in entries)
            for place, size in [*places, (archive.start_dir, 0)]:
                if place not in expected:
                    raise CheckpointError(f"{path}: damaged (its entries do not follow each other)")
                file.seek(place + 26)
                end = place + 30 + sum(struct.unpack("<HH", file.read(4))) + size  # header, name, padding, content
                expected = (end + 16, end + 24) if size else (end,)  # the data descriptor of PyTorch's writer
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not fit); use another checkpoint")
