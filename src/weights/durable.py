"""A file that is whole or absent, and a folder that one process holds.

A file is written beside its target, flushed, fsynced and renamed, and its folder is fsynced. So at any moment, whatever
happens, the old file or the new one is there. No torch in here.
"""

import fcntl
import io
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError, errors_at

TEMPORARY_SUFFIX, LOCK = ".tmp", ".lock"


class _EarlyWriter(io.BufferedWriter):
    """Has the system write to the disk while more comes, and not keep what is written: the fsync is short then."""

    waiting = 0  # bytes

    def write(self, data: Any) -> int:
        self.waiting += len(data)
        if self.waiting >= 1 << 25 and hasattr(os, "posix_fadvise"):
            self.flush()
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.waiting = 0
        return super().write(data)


@contextmanager
def durable_file(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """Yield a file to write; once the block ends well, path holds it, durably. On any failure path is untouched.

    Raises UserError when the disk does not take it, naming the path, the bytes needed (as the caller says, or as many
    as were written) and the bytes free.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    before = "; what was there before is untouched"
    try:
        temporary.unlink(missing_ok=True)  # it may be a second name of another file
        with _EarlyWriter(io.FileIO(temporary, "wb")) as file:
            yield file
            file.flush()
            needed = max(needed, file.tell())
            os.fsync(file.fileno())
        temporary.replace(path)
        before = ""
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # a disk that went read-only refuses these too
            needed = max(needed, temporary.stat().st_size)
            temporary.unlink()
        reason: BaseException | None = error
        while reason and not isinstance(reason, OSError):  # torch.save raises an error of its own after the disk's
            reason = reason.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"{path}: cannot write it: {reason.strerror or reason} ({needed:,} bytes are needed, "
                        f"{free_bytes(path.parent):,} are free){before}") from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def sync_folder(folder: Path) -> None:
    """Make renames, links and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path, what: str = "run", flag: str = "--checkpoint_dir") -> Iterator[None]:
    """Hold the folder. The system lets go of it when the process ends, however it ends.

    Raises UserError naming the holder when another process holds it.
    """
    with errors_at(f"{folder}: cannot write there"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: another {what} is writing there ({file.read().strip()}); wait for it, stop it, "
                            f"or choose another {flag}") from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
