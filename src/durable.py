"""Files that are whole or absent: written beside the target, hashed on the way, fsynced, renamed, folder fsynced."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from cli import UserError

TEMPORARY_SUFFIX = ".tmp"
_BLOCK = 1 << 22


class HashingFile:
    """A binary file that is only appended to, and the SHA-256 of what was written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None  # why a write failed: torch.save raises something else after it

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def durable_file(path: Path, needed: int = 0) -> Iterator[HashingFile]:
    """Give a file to write; once the block ends well, path holds it, durably. On any failure path is untouched.

    Raises UserError when the disk does not take it, naming the path, the bytes needed (as given, or as far as they
    were written) and the bytes free.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    file = None
    try:
        with temporary.open("wb") as raw:
            file = HashingFile(raw)
            yield file
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        reason = file.error if file and file.error else error
        if not isinstance(reason, OSError):
            raise
        needed = max(needed, file.size if file else 0)
        raise UserError(f"{path}: cannot write it: {reason.strerror or reason} ({needed:,} bytes are needed, "
                        f"{free_bytes(path.parent):,} are free); what was there before is untouched") from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def lock_folder(folder: Path) -> IO[str]:
    """Hold the folder until the file is closed, which the system does when the process ends, however it ends.

    Raises UserError naming the holder when another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: another run is writing there ({file.read().strip()}); wait for it, stop it, or "
                        "choose another --checkpoint_dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def sync_folder(folder: Path) -> None:
    """Make renames, links and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, end: int | None = None) -> "hashlib._Hash":
    """The SHA-256 object of a file's first end bytes (default: all)."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size if end is None else end
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest
