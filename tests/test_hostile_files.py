"""Files that mean harm: nothing in them runs, nothing is read outside their folder, and they are told in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import durable
from checkpoint import load, load_pretrained
from cli import CheckpointError, UserError, printable_line
from conftest import SRC, run_script
from helpers import open_data, write_data
from manifest import KINDS, MANIFEST, manifest_bytes, shard_file
from test_checkpoint import Malicious, hostile_files

# Checkpoints


def seal(path: Path) -> None:
    """Give a zip the checksum that marks a checkpoint of ours: anybody can compute it."""
    data = path.read_bytes()
    comment = durable._MARK + hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data[:-2] + len(comment).to_bytes(2, "little") + comment)


def test_hostile_files_with_our_checksum_do_nothing_either(tmp_path):
    victim = tmp_path / "executed"
    files = hostile_files(tmp_path, victim)
    files["format"] = tmp_path / "format.pt"
    torch.save({"format": "gpt2-instruct", "format_version": 1, "model": {},
                "x": Malicious(os.system, f"touch {victim}")}, files["format"])
    for path in files.values():
        if zipfile.is_zipfile(path):
            seal(path)
            assert durable.is_sealed(path)
        for function in (load, load_pretrained):
            with pytest.raises(CheckpointError, match=path.name):
                function(path)
    assert not victim.exists()


CASES = [("train_instruct.py", "--pretrained_model", "os.system"),
         ("train_instruct.py", "--resume", "optimizer"), ("chat.py", "--checkpoint", "exec, nested")]
MORE = [(script, flag, name) for script, flag, _ in CASES
        for name in ("eval", "config", "legacy format", "a bare pickle", "path traversal", "a zip bomb")]


@pytest.mark.parametrize("script, flag, name", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow)
                                                          for case in MORE)])
def test_no_command_line_runs_a_hostile_file(tmp_path, script, flag, name):
    victim = tmp_path / "executed"
    path = hostile_files(tmp_path, victim)[name]
    flags = [flag, path]
    if flag == "--pretrained_model":
        write_data(tmp_path / "data", {"train": [([1, 2], 1)], "val": [([1, 2], 1)]})
        flags += ["--data_dir", tmp_path / "data", "--checkpoint_dir", tmp_path / "run"]
    code, stdout, stderr = run_script(script, *flags)
    assert (code, stdout, stderr.count("\n")) == (3, "", 1)
    assert stderr.startswith(f"error: {path}: ")
    assert not victim.exists()


def test_src_has_no_way_to_unpickle():
    text = "".join(path.read_text() for path in SRC.glob("*.py"))
    assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.|import pickle|np\.load\(", text)


# Prepared data


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its checksums fit."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


def forge_array(folder: Path, kind: str, data: bytes, **entries: object) -> None:
    """Replace an array of the first train shard and make SHA-256, counts and checksums fit."""
    def change(manifest: dict[str, Any]) -> None:
        shard = manifest["shards"]["train"][0]
        shard_file(folder, "train", shard, kind).write_bytes(data)
        shard["sha256"][kind] = hashlib.sha256(data).hexdigest()
        shard.update(entries)

    forge(folder, change)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(200)


def npy_of_length(length: int) -> bytes:
    return npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({length},)}}")


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two train examples of 4 and 3 tokens, one shard a split."""
    return write_data(tmp_path / "data", {"train": [([11, 12, 13, 14], 2), ([21, 22, 23], 1)], "val": [([5, 6], 1)]})


def check_refused(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_data(folder)
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value) and "\n" not in printable_line(caught.value)


FIRST: Callable[[dict[str, Any]], dict[str, Any]] = lambda manifest: manifest["shards"]["train"][0]  # noqa: E731
HUGE = 10**30
FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "traversal": lambda m: FIRST(m).update(name="../../outside/00000-0123456789abcdef"),
    "absolute name": lambda m: FIRST(m).update(name="/etc/passwd"),
    "NUL in a name": lambda m: FIRST(m).update(name="00000-0123456789abcde\0"),
    "newline after a name": lambda m: FIRST(m).update(name=FIRST(m)["name"] + "\n"),
    "empty name": lambda m: FIRST(m).update(name=""),
    "name of another type": lambda m: FIRST(m).update(name=["x"]),
    "no name": lambda m: FIRST(m).pop("name"),
    "name that drives a terminal": lambda m: FIRST(m).update(name="\x1b[2J"),
    "huge count": lambda m: FIRST(m).update(tokens=HUGE),
    "negative count": lambda m: FIRST(m).update(examples=-1),
    "count that is a float": lambda m: FIRST(m).update(tokens=7.0),
    "count that is true": lambda m: FIRST(m).update(examples=True),
    "infinite count": lambda m: FIRST(m).update(tokens=float("inf")),
    "SHA-256 of another type": lambda m: FIRST(m).update(sha256={kind: 7 for kind in KINDS}),
    "no SHA-256": lambda m: FIRST(m).update(sha256={}),
    "SHA-256 is text": lambda m: FIRST(m).update(sha256="x"),
    "a shard is text": lambda m: m["shards"].update(train=["x"]),
    "a split is an object": lambda m: m["shards"].update(train={}),
    "a split without shards": lambda m: m["shards"].update(train=[]),
    "a split more": lambda m: m["shards"].update(test=[]),
    "no val split": lambda m: m["shards"].pop("val"),
    "shards is null": lambda m: m.update(shards=None),
    "shards is a list": lambda m: m.update(shards=[]),
    "template of another type": lambda m: m.update(template=7),
    "tokenizer of another type": lambda m: m.update(tokenizer=[]),
    "format of another type": lambda m: m.update(format_version="1"),
    "huge format": lambda m: m.update(format_version=HUGE),
    "format that drives a terminal": lambda m: m.update(format_version="\x1b[2J" * 1000),
    "shards of another split": lambda m: m["shards"].update(train=m["shards"]["val"] * 2),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_refused(data, case, monkeypatch):
    forge(data, FORGED[case])
    opened: list[str] = []
    real = Path.open

    def watched(path: Path, *rest: Any, **more: Any) -> Any:
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(Path, "open", watched)
    check_refused(data)
    assert all(Path(path).resolve().is_relative_to(data.resolve()) for path in opened)


OTHERS = ["7", "[]", "null", '"x"', "{}", "[" * 100_000, '{"format_version": ' + "9" * 5000 + "}",
          '{"format_version": 1, "shards": {}}', "{" * 5, "\0" * 100]


@pytest.mark.parametrize("text", OTHERS, ids=range(len(OTHERS)))
def test_a_manifest_that_is_something_else_is_refused(data, text):
    (data / MANIFEST).write_text(text)
    check_refused(data)


U16, U8, I64 = np.uint16, np.uint8, np.int64
GOOD = {"tokens": np.arange(7, dtype=U16), "loss_mask": np.array([0, 0, 1, 1, 0, 1, 1], U8),
        "starts": np.array([0, 4], I64)}
ARRAYS: dict[str, tuple[str, Callable[[Path], bytes], dict[str, int]]] = {
    "objects": ("tokens", lambda victim: npy(np.array([Malicious(os.system, f"touch {victim}")] * 7, object)), {}),
    "a pickle": ("tokens", lambda victim: __import__("pickle").dumps(Malicious(os.system, f"touch {victim}")), {}),
    "objects in a structure": ("starts", lambda _: npy(np.zeros(2, [("a", I64), ("b", object)])), {}),
    "a zip of arrays": ("tokens", lambda _: npz(tokens=GOOD["tokens"]), {}),
    "empty": ("tokens", lambda _: b"", {}),
    "header alone": ("tokens", lambda _: npy(GOOD["tokens"])[:128], {}),
    "negative length": ("tokens", lambda _: npy_of_length(-1), {}),
    "huge length": ("tokens", lambda _: npy_of_length(HUGE), {}),
    "petabytes": ("tokens", lambda _: npy_of_length(2**50), {}),
    "code in the header": ("tokens", lambda victim: npy_header(f"open({str(victim)!r}, 'w')"), {}),
    "deep header": ("tokens", lambda _: npy_header("(" * 5000 + ")" * 5000), {}),
    "no header": ("tokens", lambda _: npy_header("{'descr': '<u2'"), {}),
    "float tokens": ("tokens", lambda _: npy(GOOD["tokens"].astype(float)), {}),
    "two dimensions": ("tokens", lambda _: npy(GOOD["tokens"][None]), {}),
    "no dimension": ("starts", lambda _: npy(np.array(0, I64)), {}),
    "big-endian": ("tokens", lambda _: npy(GOOD["tokens"].astype(">u2")), {}),
    "too few tokens": ("tokens", lambda _: npy(GOOD["tokens"][:6]), {}),
    "too few tokens, count fits": ("tokens", lambda _: npy(GOOD["tokens"][:6]), {"tokens": 6}),
    "mask longer": ("loss_mask", lambda _: npy(np.append(GOOD["loss_mask"], U8(1))), {}),
    "mask shorter": ("loss_mask", lambda _: npy(GOOD["loss_mask"][:-1]), {}),
    "mask of 2": ("loss_mask", lambda _: npy(GOOD["loss_mask"] * U8(2)), {}),
    "mask without a response": ("loss_mask", lambda _: npy(GOOD["loss_mask"] * U8(0)), {}),
    "mask without a prompt": ("loss_mask", lambda _: npy(np.ones(7, U8)), {}),
    "no starts": ("starts", lambda _: npy(np.zeros(0, I64)), {"examples": 0}),
    "starts beyond": ("starts", lambda _: npy(np.array([0, 7], I64)), {}),
    "starts far beyond": ("starts", lambda _: npy(np.array([0, 2**62], I64)), {}),
    "starts negative": ("starts", lambda _: npy(np.array([0, -4], I64)), {}),
    "starts not at 0": ("starts", lambda _: npy(np.array([1, 4], I64)), {}),
    "starts backwards": ("starts", lambda _: npy(np.array([4, 0], I64)), {}),
    "starts twice": ("starts", lambda _: npy(np.array([0, 0], I64)), {}),
    "token above the vocabulary": ("tokens", lambda _: npy(np.array([1, 2, 3, 4, 5, 6, 50257], U16)), {}),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_forged_array_is_refused(data, tmp_path, case):
    kind, content, entries = ARRAYS[case]
    victim = tmp_path / "executed"
    forge_array(data, kind, content(victim), **entries)
    check_refused(data)
    assert not victim.exists()


def test_arrays_that_are_good_are_taken(data):
    for kind, array in GOOD.items():
        forge_array(data, kind, npy(array))
    assert open_data(data)["train"].example(1)[0].tolist() == [4, 5, 6]


def test_the_trainer_refuses_forged_data_in_one_line(data):
    forge_array(data, *(part if isinstance(part, str) else part(data) for part in ARRAYS["objects"][:2]))
    code, stdout, stderr = run_script("train_instruct.py", "--data_dir", data, "--checkpoint_dir", data / "run",
                                      "--from_scratch", "1,1,8", "--context_length", "8", "--device", "cpu",
                                      "--tensorboard_dir", data / "runs")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert ".tokens.npy: not an array that can be read (ValueError); prepare the data again" in stderr
