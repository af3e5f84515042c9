"""A file that is whole or absent, and a folder that one process holds.

A file is written beside its target, flushed, fsynced and renamed, and its folder is fsynced. So at any moment, whatever
happens, the old file or the new one is there. No torch in here.
"""

import errno
import fcntl
import io
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError, errors_at

TEMPORARY_SUFFIX, LOCK = ".tmp", ".lock"
Say = Callable[[str], None]  # takes a line for the user
_HOLDER = re.compile(r"(process \d+ on .*\n)?")  # what a lock of ours holds


def say_nothing(line: str) -> None:
    pass


class _EarlyWriter(io.BufferedWriter):
    """Has the system write to the disk while more comes, and not keep what is written: the fsync is short then."""

    waiting = 0  # bytes

    def write(self, data: Any) -> int:
        self.waiting += len(data)
        if self.waiting >= 1 << 25:
            self.flush()
            with suppress(OSError, AttributeError):  # it is advice, which not every system takes
                os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.waiting = 0
        return super().write(data)


@contextmanager
def durable_file(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """Yield a file to write; once the block ends well, path holds it, durably. On any failure path is untouched. Its
    folder is made if it is not there: somebody may have removed it in mid-run. Raises UserError when the disk does not
    take it, naming the path, the bytes needed (as the caller says, or as many as were written) and the bytes free."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it may be a second name of another file
        with _EarlyWriter(io.FileIO(temporary, "wb")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
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
        room = f" ({needed:,} bytes are needed, {free_bytes(path.parent):,} are free)"
        raise UserError(f"{path}: cannot write it: {reason.strerror or reason}"
                        + room * (reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))) from error


def free_bytes(folder: Path) -> float:
    """The bytes that are free there; without end where the file system does not say."""
    try:
        return shutil.disk_usage(folder).free if folder.is_dir() else 0
    except OSError:
        return float("inf")


def sync_folder(folder: Path) -> None:
    """Make renames, links and removals in a folder durable, where the file system can sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path, what: str = "run", flag: str = "--checkpoint_dir",
                warn: Say = say_nothing, is_named: bool = True) -> Iterator[None]:
    """Hold the folder until the process ends, however it ends. Where the file system has no locks, warn says so.
    is_named: whether the lock is to name this process. Raises UserError naming the holder when another process holds
    it, and naming the lock when it cannot be used."""
    path = folder / LOCK
    with errors_at(f"{folder}: cannot write there", advice=f"; choose another {flag}"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder}: no folder, or a link to one that is not there; choose another {flag}")
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()
                                      or not _HOLDER.fullmatch(path.read_text(errors="replace"))):
            raise UserError(f"{path}: not a lock of this program; move it away, or choose another {flag}")
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another {what} is writing there ({path.read_text().strip()}); wait for it, "
                            f"stop it, or choose another {flag}") from None
        except OSError as error:
            warn(f"warning: {path}: this file system has no locks ({error.strerror}); a second {what} in this folder "
                 "would not be noticed, so start none")

    def name_holder(text: str) -> None:
        with suppress(OSError):  # a full disk takes no name; the lock is there all the same
            if is_named:
                file.truncate(0)
                file.write(text.encode())

    with file:
        name_holder(f"process {os.getpid()} on {platform.node()}\n")
        try:
            yield
        finally:
            name_holder("")
