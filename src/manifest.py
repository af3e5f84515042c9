"""The manifest of prepared data: its name, its format, its checksum, and the fingerprint of what training sees."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cli import UserError

FORMAT_VERSION = 1
MANIFEST = "dataset_info.json"
KINDS = ("tokens", "loss_mask", "starts")  # the arrays of a shard
_SHARD_NAME = re.compile(r"\d{5,9}-[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_file(data_dir: Path, split: str, shard: dict[str, Any], kind: str) -> Path:
    return data_dir / split / f"{shard['name']}.{kind}.npy"


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what training sees: template, tokenizer and the shards of both splits, in order."""
    content = {key: manifest[key] for key in ("format_version", "template", "tokenizer", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """The file of a manifest: its content, the fingerprint, and the SHA-256 of both. Any other bytes are damaged."""
    sealed = {key: value for key, value in content.items() if key not in ("fingerprint", "sha256")}
    sealed["fingerprint"] = fingerprint(content)
    sealed["sha256"] = hashlib.sha256(json.dumps(sealed).encode()).hexdigest()
    return (json.dumps(sealed, indent=2) + "\n").encode()


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises UserError when it is missing, damaged, of another format, or forged."""
    path = data_dir / MANIFEST
    try:
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: format {manifest['format_version']!r:.40}, this version reads {FORMAT_VERSION}; "
                            "prepare the data again")
        intact = data == manifest_bytes(manifest)
    except FileNotFoundError:
        raise UserError(f"{path}: no prepared data there; run: python src/prepare_instruct_dataset.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest of prepared data ({error!r}); prepare the data again") from error
    if not intact:
        raise UserError(f"{path}: changed or damaged (its checksum does not fit); prepare the data again")
    if not _is_usable(manifest):
        raise UserError(f"{path}: its shards are not as this program writes them; prepare the data again")
    return manifest


def _is_usable(manifest: dict[str, Any]) -> bool:
    """Whether everything that is read from it has the right type, and no name leads out of the folder. A forged
    manifest has fitting checksums too."""
    shards = manifest["shards"]
    return (all(isinstance(manifest[key], str) for key in ("template", "tokenizer"))
            and isinstance(shards, dict) and sorted(shards) == ["train", "val"]
            and all(isinstance(entries, list) and entries for entries in shards.values())
            and all(_is_shard(entry) for entries in shards.values() for entry in entries))


def _is_shard(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), dict):
        return False
    texts = [(_SHARD_NAME, entry.get("name")), *((_SHA256, entry["sha256"].get(kind)) for kind in KINDS)]
    return (all(isinstance(text, str) and pattern.fullmatch(text) for pattern, text in texts)
            and all(type(entry.get(key)) is int for key in ("examples", "tokens", "response_tokens")))
