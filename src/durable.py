"""Files that are whole or absent: written beside the target, hashed on the way, fsynced, renamed, folder fsynced."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cli import UserError

TEMPORARY_SUFFIX = ".tmp"
_BLOCK = 1 << 22


class HashingFile:
    """A binary file that is only appended to, and the SHA-256 of what was written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def durable_file(path: Path) -> Iterator[HashingFile]:
    """Give a file to write; once the block ends well, path holds it, durably. On any failure path is untouched.

    Raises UserError naming the path, the bytes written so far and the bytes free, when the disk does not take it.
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
        if not isinstance(error, OSError):
            raise
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise UserError(f"{path}: cannot write it: {error.strerror or error} ({file.size if file else 0:,} bytes were "
                        f"written, {free:,} are free); what was there before is untouched") from error


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
