"""Prepared data on disk, written and read here: the arrays of the shards, the manifest, the fingerprint.

    dataset_info.json                       the manifest: written last, and the only way in
    train/00000-<hash>.tokens.npy           uint16
    train/00000-<hash>.loss_mask.npy        uint8: 1 where the model is trained to predict the token
    train/00000-<hash>.starts.npy           int64: where each document begins
    val/...

Shards are named by their content and written beside whatever is there; then the manifest is replaced in one step; then
shards that it does not name are removed. Killed at any moment, the folder holds the old data or the new, whole.
"""

import hashlib
import io
import json
import os
import re
import shlex
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError, errors_at, python
from instruct_format import TEMPLATE, TOKENIZER
from weights.durable import TEMPORARY_SUFFIX, durable_file

FORMAT_VERSION = 1
MANIFEST = "dataset_info.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 1 << 24  # the most in a shard of several documents: 48 MiB of tokens and loss mask
KINDS = {"tokens": "H", "loss_mask": "B", "starts": "q"}  # the arrays of a shard: uint16, uint8, int64
_AGAIN = "; prepare the data again"
_SHARD_NAME = re.compile(r"\d{5,9}-[0-9a-f]{16}")  # it cannot lead out of the folder
_SHARD_FILE = re.compile(rf"{_SHARD_NAME.pattern}\.({'|'.join(KINDS)})\.npy({re.escape(TEMPORARY_SUFFIX)})?")


class Document(NamedTuple):
    """One example as the model sees it."""

    tokens: np.ndarray  # (n_tokens,) uint16
    loss_mask: np.ndarray  # (n_tokens,) uint8


class Prepared(NamedTuple):
    """A folder of prepared data and its manifest, whose fingerprint says which data these are."""

    folder: Path
    manifest: dict[str, Any]


def shard_file(folder: Path, split: str, shard: Mapping[str, Any], kind: str) -> Path:
    return folder / split / f"{shard['name']}.{kind}.npy"


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The file of a manifest: its content, the fingerprint, and the SHA-256 of both. Any other bytes are damaged."""
    seen = {key: content[key] for key in ("format_version", "template", "tokenizer", "shards")}
    sealed = {key: value for key, value in content.items() if key not in ("fingerprint", "sha256")}
    sealed["fingerprint"] = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()
    sealed["sha256"] = hashlib.sha256(json.dumps(sealed).encode()).hexdigest()
    return (json.dumps(sealed, indent=2) + "\n").encode()


class DataWriter:
    """Writes documents into the shards of a folder, each of at most SHARD_TOKENS tokens (or one document)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.waiting: defaultdict[str, dict[str, array[int]]] = defaultdict(
            lambda: {kind: array(code) for kind, code in KINDS.items()})  # split -> its next shard
        for path in _foreign_files(folder):
            raise UserError(f"{path}: not of a preparation by this program, so it stays; choose another --output_dir")
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)

    @property
    def empty_splits(self) -> list[str]:
        return [split for split in SPLITS if not self.shards[split] and split not in self.waiting]

    def add(self, split: str, document: Document) -> None:
        """Raises UserError when the disk does not take a shard that is full."""
        if split in self.waiting and len(self.waiting[split]["tokens"]) + len(document.tokens) > SHARD_TOKENS:
            self._write_shard(split)
        waiting = self.waiting[split]
        waiting["starts"].append(len(waiting["tokens"]))
        waiting["tokens"].frombytes(document.tokens.tobytes())
        waiting["loss_mask"].frombytes(document.loss_mask.tobytes())

    def deal_again(self, in_val: Iterable[bool]) -> None:
        """Put every document where in_val says, in their order; so far all of them are in one split."""
        [full] = [split for split in SPLITS if split not in self.empty_splits]
        self._write_shard(full)
        entries, self.shards[full] = self.shards[full], []
        sides = iter(in_val)
        for entry in entries:
            tokens, mask, starts = open_shard(self.folder, full, entry).values()
            for document in zip(np.split(tokens, starts[1:]), np.split(mask, starts[1:])):
                self.add("val" if next(sides) else "train", Document(*document))

    def _write_shard(self, split: str) -> None:
        waiting = self.waiting.pop(split)
        files = {kind: io.BytesIO() for kind in KINDS}
        for kind, values in waiting.items():
            np.save(files[kind], np.asarray(values))
        digests = {kind: hashlib.sha256(data.getbuffer()).hexdigest() for kind, data in files.items()}
        content = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        shard = {"name": f"{len(self.shards[split]):05d}-{content[:16]}", "examples": len(waiting["starts"]),
                 "tokens": len(waiting["tokens"]), "response_tokens": int(np.sum(waiting["loss_mask"])),
                 "sha256": digests}
        for kind, data in files.items():
            with durable_file(shard_file(self.folder, split, shard, kind)) as file:
                file.write(data.getbuffer())
        self.shards[split].append(shard)

    def finish(self, about: Mapping[str, Any], multi_turn: bool = False) -> dict[str, Any]:
        """Write what waits and the manifest (about says where the data come from, multi_turn whether chat is to
        remember the turns before), and remove every shard that it does not name. Returns the manifest."""
        for split in list(self.waiting):
            self._write_shard(split)
        counts = {f"{split}_{key}": sum(shard[key] for shard in shards)
                  for split, shards in self.shards.items() for key in ("examples", "tokens", "response_tokens")}
        manifest = {"format_version": FORMAT_VERSION, "template": TEMPLATE, "tokenizer": TOKENIZER, **about, **counts,
                    "multi_turn": multi_turn, "shards": self.shards}
        with durable_file(self.folder / MANIFEST) as file:
            file.write(manifest_bytes(manifest))
        for split, shards in self.shards.items():
            named = {shard_file(self.folder, split, shard, kind) for shard in shards for kind in KINDS}
            for path in (self.folder / split).iterdir():
                if _SHARD_FILE.fullmatch(path.name) and path not in named:
                    path.unlink()
        return manifest


def _foreign_files(folder: Path) -> Iterator[Path]:
    """What other programs or people keep where a preparation would replace it or mix it with its own. Hidden files do
    not matter. A damaged manifest is ours too: the advice for it is to prepare the data again."""
    manifest = folder / MANIFEST
    if os.path.lexists(manifest) and not (
            manifest.is_file() and re.search(rb'"(format_version|loss_mask)"', manifest.read_bytes())):
        yield manifest
    for path in (folder / split for split in SPLITS):
        if path.is_symlink() or path.is_file():  # what a link leads to may be the folder of other data
            yield path
        yield from (each for each in path.glob("[!.]*") if not _SHARD_FILE.fullmatch(each.name))


def open_prepared(folder: Path) -> Prepared:
    """The prepared data of a folder. Raises UserError when its manifest cannot be used."""
    path = folder / MANIFEST
    if not path.exists() and ((whole := folder.resolve().parent) / MANIFEST).exists():
        raise UserError(f"{folder}: a part of prepared data; name the whole folder: --data_dir "
                        f"{shlex.quote(str(whole))}")
    if not path.exists():
        raise UserError(f"{path}: no prepared data there; name the folder with --data_dir, or run: {python()} src/"
                        f"prepare_instruct_dataset.py {'--dataset' if folder.is_file() else '--output_dir'} {folder}")
    with errors_at(path, Exception, advice=_AGAIN):  # a forged manifest can fail anywhere
        data = _regular(path).read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        if (made := (manifest["format_version"], manifest["template"])) != (FORMAT_VERSION, TEMPLATE):
            raise ValueError(f"format and template are {made!r:.60}, this version reads {(FORMAT_VERSION, TEMPLATE)}")
        if data != manifest_bytes(manifest):
            raise ValueError("changed or damaged (its checksum does not fit)")
        if not all(shards and all(_SHARD_NAME.fullmatch(shard["name"]) for shard in shards)
                   for shards in (manifest["shards"][split] for split in SPLITS)):
            raise ValueError("its shards are not as this program writes them")
    return Prepared(folder, manifest)


def open_shard(folder: Path, split: str, shard: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a shard, by kind, memory-mapped. Raises UserError when one is missing, or is not that of the
    manifest: by its SHA-256, type and size."""
    arrays: dict[str, np.ndarray] = {}
    for kind, code in KINDS.items():
        path = shard_file(folder, split, shard, kind)
        with errors_at(path, Exception, advice=_AGAIN):  # a forged one fails anywhere in numpy's reader
            if hashlib.sha256(_regular(path).read_bytes()).hexdigest() != shard["sha256"][kind]:
                raise ValueError("damaged or changed (its SHA-256 is not the manifest's)")
            arrays[kind] = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it never unpickles nor unzips
            size = shard["examples" if kind == "starts" else "tokens"]
            if arrays[kind].dtype != code or arrays[kind].shape != (size,):
                raise ValueError("not of the type and size that the manifest says")
    return arrays


def _regular(path: Path) -> Path:
    """Raises ValueError for a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    return path
