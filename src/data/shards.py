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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError, errors_at
from instruct_format import TEMPLATE, TOKENIZER, VOCAB_SIZE
from weights.durable import TEMPORARY_SUFFIX, durable_file

FORMAT_VERSION = 1
MANIFEST = "dataset_info.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 1 << 24  # the most in a shard of several documents: 48 MiB of tokens and loss mask
KINDS = {"tokens": np.uint16, "loss_mask": np.uint8, "starts": np.int64}  # the arrays of a shard
_SHARD_NAME = re.compile(r"\d{5,9}-[0-9a-f]{16}")  # it cannot lead out of the folder


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
        self.waiting: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self.waiting_tokens = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)

    @property
    def empty_splits(self) -> list[str]:
        return [split for split in SPLITS if not self.shards[split] and not self.waiting[split]]

    def add(self, split: str, document: Document) -> None:
        """Raises UserError when the disk does not take a shard that is full."""
        if self.waiting[split] and self.waiting_tokens[split] + len(document.tokens) > SHARD_TOKENS:
            self._write_shard(split)
        self.waiting[split].append(document)
        self.waiting_tokens[split] += len(document.tokens)

    def _write_shard(self, split: str) -> None:
        documents, self.waiting[split], self.waiting_tokens[split] = self.waiting[split], [], 0
        lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
        mask = np.concatenate([document.loss_mask for document in documents])
        arrays = (np.concatenate([document.tokens for document in documents]), mask, np.cumsum(lengths) - lengths)
        files = {kind: _npy_bytes(array) for kind, array in zip(KINDS, arrays)}
        digests = {kind: hashlib.sha256(data).hexdigest() for kind, data in files.items()}
        content = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        shard = {"name": f"{len(self.shards[split]):05d}-{content[:16]}", "examples": len(lengths),
                 "tokens": len(mask), "response_tokens": int(mask.sum()), "sha256": digests}
        for kind, data in files.items():
            with durable_file(shard_file(self.folder, split, shard, kind)) as file:
                file.write(data)
        self.shards[split].append(shard)

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write what waits and the manifest (about says where the data come from), and remove every shard, whole or
        half-written, that the manifest does not name. Returns the manifest."""
        for split in SPLITS:
            if self.waiting[split]:
                self._write_shard(split)
        counts = {f"{split}_{key}": sum(shard[key] for shard in shards)
                  for split, shards in self.shards.items() for key in ("examples", "tokens", "response_tokens")}
        manifest = {"format_version": FORMAT_VERSION, "template": TEMPLATE, "tokenizer": TOKENIZER, **about, **counts,
                    "shards": self.shards}
        with durable_file(self.folder / MANIFEST) as file:
            file.write(manifest_bytes(manifest))
        for split, shards in self.shards.items():
            named = {shard_file(self.folder, split, shard, kind) for shard in shards for kind in KINDS}
            for path in (self.folder / split).iterdir():
                if path.name.removesuffix(TEMPORARY_SUFFIX).endswith(".npy") and path not in named:
                    path.unlink()
        return manifest


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def open_prepared(folder: Path) -> Prepared:
    """The prepared data of a folder. Raises UserError when its manifest is missing, damaged, of another format or
    template, or names files that lie elsewhere."""
    path, again = folder / MANIFEST, "; prepare the data again"
    if not path.exists():
        raise UserError(f"{path}: no prepared data there; run: python src/prepare_instruct_dataset.py")
    with errors_at(f"{path}: not a manifest of prepared data", Exception, advice=again):  # a forged one fails anyhow
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: format {manifest['format_version']!r:.40}, this version reads {FORMAT_VERSION}"
                            f"{again}")
        if data != manifest_bytes(manifest):
            raise UserError(f"{path}: changed or damaged (its checksum does not fit){again}")
        shards = [manifest["shards"][split] for split in SPLITS]
        if not all(shards) or not all(
                _SHARD_NAME.fullmatch(shard["name"]) and shard["sha256"].keys() >= KINDS.keys()
                and type(shard["tokens"]) is type(shard["examples"]) is int for shard in sum(shards, [])):
            raise UserError(f"{path}: its shards are not as this program writes them{again}")
    if manifest["template"] != TEMPLATE:
        raise UserError(f"{folder}: prepared with template {manifest['template']!r}, this version knows {TEMPLATE!r}"
                        f"{again}")
    return Prepared(folder, manifest)


def open_shards(prepared: Prepared, split: str, vocab_size: int = VOCAB_SIZE) -> list[dict[str, np.ndarray]]:
    """The arrays of a split's shards, by kind, memory-mapped.

    Raises UserError when one is missing, not the one that the manifest names (SHA-256), or not what a model of this
    vocabulary can be trained on.
    """
    shards = []
    for entry in prepared.manifest["shards"][split]:
        shard = {kind: _open_array(shard_file(prepared.folder, split, entry, kind), entry["sha256"][kind])
                 for kind in KINDS}
        tokens, _, starts = shard.values()
        wrong, sizes = "", [(entry["tokens"],), (entry["tokens"],), (entry["examples"],)]
        if (any(array.dtype != dtype or array.shape != size
                for array, dtype, size in zip(shard.values(), KINDS.values(), sizes))
                or not len(starts) or starts[0] != 0 or (np.diff(starts, append=len(tokens)) <= 0).any()):
            wrong = "its arrays are not of the types and sizes that the manifest says"
        elif tokens.max() >= min(vocab_size, VOCAB_SIZE):
            wrong = f"it has token {tokens.max()}, the vocabulary has {vocab_size}"
        if wrong:
            raise UserError(f"{prepared.folder / split / entry['name']}: {wrong}; prepare the data again")
        shards.append(shard)
    return shards


def _open_array(path: Path, sha256: str) -> np.ndarray:
    digest, again = hashlib.sha256(), "; prepare the data again"
    with errors_at(path, Exception, advice=again):  # a forged one fails anywhere in numpy's reader
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{path}: damaged or changed (its SHA-256 is not the manifest's){again}")
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load it never unpickles nor unzips
