"""Files that are whole or absent: written beside the target, hashed on the way, fsynced, renamed, folder fsynced.

A zip (what torch.save writes) can be sealed: its comment, the last bytes of the file, then holds the SHA-256 of
everything before it, so any flipped bit or missing byte is noticed. No torch in here: chat checks while that loads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from cli import CheckpointError, UserError

TEMPORARY_SUFFIX, LOCK = ".tmp", ".lock"
_BUFFER, _BLOCK, _SYNC = 1 << 16, 1 << 22, 1 << 25
_MARK = b"gpt2-instruct sha256="
_COMMENT_BYTES = len(_MARK) + 64


class HashingFile:
    """A binary file that is only appended to, and the SHA-256 of what was written so far.

    One thread hashes and one writes; where lasting is set, both behind the caller, who has the next piece ready
    meanwhile. Pieces of 4 MiB and more are not copied: but for the first of them, their memory then has to stay as it
    is until flush. (torch.save begins with its pickle, which is gone before the tensors'.)
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.lasting = False
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None  # why a write failed: torch.save raises something else after it
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._small = bytearray()
        self._had_large = False
        self._unsynced = 0
        self._pending: deque[Future[Any]] = deque()

    def write(self, data: bytes) -> int:
        """Take data, of any size. Raises OSError when the disk refused an earlier piece."""
        self.size += len(data)
        if len(data) < _BLOCK:
            self._small += data
        if len(data) >= _BLOCK or len(self._small) >= _BUFFER:
            self._pass_on(bytes(self._small))
            self._small.clear()
        if len(data) >= _BLOCK:
            self._pass_on(data)
            if not (self.lasting and self._had_large):
                self._wait(0)
            self._had_large = True
        return len(data)

    def flush(self) -> None:
        """Wait until everything is written and hashed. Raises OSError like write."""
        self._pass_on(bytes(self._small))
        self._small.clear()
        self._wait(0)
        self.file.flush()

    def _pass_on(self, piece: bytes) -> None:
        self._pending += [self._hashing.submit(self.sha256.update, piece), self._writing.submit(self._write, piece)]
        self._wait(64)

    def _write(self, piece: bytes) -> None:
        self.file.write(piece)
        self._unsynced += len(piece)
        if self._unsynced >= _SYNC and hasattr(os, "posix_fadvise"):  # Linux: start on the disk now, free the memory
            self.file.flush()
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0

    def _wait(self, most: int) -> None:
        """Let no more than so many tasks stay; hear of errors."""
        try:
            while len(self._pending) > most:
                self._pending.popleft().result()
        except OSError as error:
            self.error = error
            raise

    def end_threads(self) -> None:
        """Drop what is still waiting. The file may be closed afterwards."""
        self._hashing.shutdown(cancel_futures=True)
        self._writing.shutdown(cancel_futures=True)


@contextmanager
def durable_file(path: Path, needed: int = 0) -> Iterator[HashingFile]:
    """Give a file to write; once the block ends well, path holds it, durably. On any failure path is untouched.

    Raises UserError when the disk does not take it, naming the path, the bytes needed (as given, or as far as they
    were written) and the bytes free.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    file, before = None, "; what was there before is untouched"
    try:
        temporary.unlink(missing_ok=True)  # it may be a second name of another file
        with temporary.open("wb") as raw:
            file = HashingFile(raw)
            try:
                yield file
                file.flush()
            finally:
                file.end_threads()
            os.fsync(raw.fileno())
        temporary.replace(path)
        before = ""
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # a disk that went read-only refuses this too
            temporary.unlink(missing_ok=True)
        reason = file.error if file and file.error else error
        if not isinstance(reason, OSError):
            raise
        needed = max(needed, file.size if file else 0)
        raise UserError(f"{path}: cannot write it: {reason.strerror or reason} ({needed:,} bytes are needed, "
                        f"{free_bytes(path.parent):,} are free){before}") from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def lock_folder(folder: Path, what: str = "run", flag: str = "--checkpoint_dir") -> IO[str]:
    """Hold the folder until the file is closed, which the system does when the process ends, however it ends.

    Raises UserError naming the holder when another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: another {what} is writing there ({file.read().strip()}); wait for it, stop it, "
                        f"or choose another {flag}") from None
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


def sha256_of(file: BinaryIO, end: int | None = None) -> "hashlib._Hash":
    """The SHA-256 object of an open file's first end bytes (default: all)."""
    digest = hashlib.sha256()
    left = file.seek(0, os.SEEK_END) if end is None else end
    file.seek(0)
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    return digest


def seal(file: HashingFile) -> None:
    """Replace the zip's empty comment (the last two bytes, its length of 0) by the SHA-256 of the whole zip."""
    file.flush()
    comment = _MARK + file.sha256.hexdigest().encode()
    file.file.seek(-2, os.SEEK_END)
    file.file.write(len(comment).to_bytes(2, "little") + comment)


def is_sealed(path: Path) -> bool:
    """True for an intact file of ours, False for one without our mark. Raises CheckpointError for a damaged one."""
    length = _COMMENT_BYTES.to_bytes(2, "little")
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_BYTES - 2))
        tail = file.read()
        if tail[2:2 + len(_MARK)] != _MARK:
            return False
        digest = sha256_of(file, end=size - len(tail))
    digest.update(b"\0\0")
    if tail != length + _MARK + digest.hexdigest().encode():
        raise CheckpointError(f"{path}: damaged (its checksum does not fit); use another checkpoint")
    return True
