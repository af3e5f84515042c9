"""The manifest of prepared data: its name, its format, and the fingerprint of what training sees."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cli import UserError

FORMAT_VERSION = 1
MANIFEST = "dataset_info.json"
KINDS = ("tokens", "loss_mask", "starts")  # the arrays of a shard


def shard_file(data_dir: Path, split: str, shard: dict[str, Any], kind: str) -> Path:
    return data_dir / split / f"{shard['name']}.{kind}.npy"


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what training sees: template, tokenizer and the shards of both splits, in order."""
    content = {key: manifest[key] for key in ("format_version", "template", "tokenizer", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises UserError when it is missing, damaged, or of another format."""
    path = data_dir / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: format {manifest['format_version']}, this version reads {FORMAT_VERSION}; "
                            "prepare the data again")
        intact = manifest["fingerprint"] == fingerprint(manifest)
    except FileNotFoundError:
        raise UserError(f"{path}: no prepared data there; run: python src/prepare_instruct_dataset.py") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest of prepared data ({error!r}); prepare the data again") from error
    if not intact:
        raise UserError(f"{path}: changed or damaged (its fingerprint does not fit); prepare the data again")
    return manifest
