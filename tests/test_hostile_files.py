"""Files that mean harm: nothing in them runs, nothing is read outside their folder, and no terminal is driven."""

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chat
import train_instruct
from conftest import SRC, write_jsonl
from data.shards import KINDS, MANIFEST, manifest_bytes, shard_file
from errors import CheckpointError, UserError
from helpers import open_data, prepare, small_model, write_data
from test_hostile_texts import PAYLOADS, RAW
from weights.checkpoint import LATEST, load, load_run, save
from weights.pretrained import load_pretrained


class Malicious:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path, victim: Path) -> dict[str, Path]:
    """Thirteen files, each of which would create victim, or fill memory, if anything in it were obeyed."""
    system = Malicious(os.system, f"touch {victim}")
    code, weights = f"open({str(victim)!r}, 'w').close()", small_model().state_dict()
    states = {
        "os.system": {"model": system},
        "eval": Malicious(eval, code),
        "exec, nested": {"a": [({"b": Malicious(exec, code)},)]},
        "config": {"model": weights, "config": system},
        "optimizer": {"model": weights, "optimizer": {"state": {0: Malicious(eval, code)}}},
        "import": {"model": weights, "x": Malicious(importlib.import_module, "antigravity")},
        "subprocess": {"x": Malicious(subprocess.check_call, ["touch", str(victim)])},
        "popen": {"x": Malicious(os.popen, f"touch {victim}")},
        "our format": {"format": "gpt2-instruct", "format_version": 1, "model": {}, "x": system},
        "legacy format": {"x": system}, "a bare pickle": system, "path traversal": system, "a zip bomb": {},
    }
    files = {name: folder / f"hostile{number}.pt" for number, name in enumerate(states)}
    for name, path in files.items():
        torch.save(states[name], path, _use_new_zipfile_serialization=name != "legacy format")
    files["a bare pickle"].write_bytes(pickle.dumps(system))
    for name, prefix, method, size in (("path traversal", "../..", zipfile.ZIP_STORED, 0),
                                       ("a zip bomb", "archive", zipfile.ZIP_DEFLATED, 1 << 28)):
        with zipfile.ZipFile(files[name], "w", method) as archive:
            archive.writestr(f"{prefix}/data.pkl", pickle.dumps(states[name]))
            archive.writestr(f"{prefix}/version", "3\n")
            archive.writestr(f"{prefix}/data/0", bytes(size))
    return files


def train(*flags: object) -> int:
    return train_instruct.main([*map(str, flags), "--device", "cpu"])


def ask(*flags: object) -> int:
    return chat.main([*map(str, flags), "--device", "cpu"])


def test_thirteen_hostile_files_do_nothing(tmp_path):
    files = hostile_files(tmp_path, tmp_path / "executed")
    assert len(files) == 13
    for path in files.values():
        for read in (load, load_run, load_pretrained):
            with pytest.raises(CheckpointError, match=path.name):
                read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("main, flag", [(train, "--pretrained_model"), (train, "--resume"), (ask, "--checkpoint")])
def test_no_command_line_runs_a_hostile_file(tmp_path, main, flag):
    write_data(tmp_path / "data", {"train": [([1, 2], [0, 1])], "val": [([1, 2], [0, 1])]})
    folders = [part for name in ("data", "checkpoint", "tensorboard") for part in (f"--{name}_dir", tmp_path / name)]
    for path in hostile_files(tmp_path, tmp_path / "executed").values():
        with pytest.raises(CheckpointError, match=path.name):
            main(flag, path, *(folders if main is train else []))
    assert not (tmp_path / "executed").exists()


def test_src_has_no_way_to_unpickle():
    text = "".join(path.read_text() for path in SRC.rglob("*.py"))
    assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.|import pickle|np\.load\(", text)


# The state of a run


def with_moments(state: dict[str, Any], **changes: torch.Tensor | None) -> dict[str, Any]:
    moments = {**state["optimizer"]["state"], 0: {**state["optimizer"]["state"][0], **changes}}
    return {"optimizer": {**state["optimizer"], "state": moments}}


FORGED_VALUES: dict[str, list[Any]] = {  # the last position is beyond the data
    "position": ["ab", [0, -5], [10**30, 0], None, [0, 4]], "step": [-5, 10**30], "skipped": ["x"],
    "name": ["../../escaped", "/tmp/escaped", 7, "a\0b", "\x1b[2J"], "data_fingerprint": [7], "optimizer": [7],
    "options": [[1], {"max_steps": "x"}, {"mini_batch_size": -1}, {"learning_rate": float("nan")}],
    "model": [{"a": torch.ones(1, device="meta")}, {5: torch.ones(1)}, {"a": torch.zeros(1).expand(1 << 38)}],
}
FORGED_STATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **{f"{name}{n}": lambda _, name=name, value=value: {name: value}
       for name, values in FORGED_VALUES.items() for n, value in enumerate(values)},
    **{f"huge {size}": lambda state, size=size: {"model_config": {**state["model_config"], size: 10**8}}
       for size in ("n_layer", "vocab_size", "n_embd")},
    "whole numbers": lambda state: {"model": {name: weight.long() for name, weight in state["model"].items()}},
    "no moments": lambda state: {"optimizer": {**state["optimizer"], "state": {}}},
    "moments of another shape": lambda state: with_moments(state, exp_avg=torch.ones(3)),  # AdamW would not look
    "a moment less": lambda state: with_moments(state, exp_avg_sq=None),
}


@pytest.mark.parametrize("case", FORGED_STATES)
def test_a_forged_state_is_refused(tmp_path, run_state, case):
    path = tmp_path / "step_000001.pt"
    save(path, run_state)
    assert train("--resume", path, "--tensorboard_dir", tmp_path) == 0
    save(path, {**run_state, **FORGED_STATES[case](run_state)})
    with pytest.raises(CheckpointError, match=path.name):
        train("--resume", path, "--tensorboard_dir", tmp_path)


def test_a_run_prints_and_logs_no_payload(tmp_path, capfd):
    """All payloads in the prompts that TensorBoard shows, and in the names of the folders; then a resume that skips."""
    evil = "".join(PAYLOADS).replace("/", "|")[:60]
    data, run, log = (tmp_path / f"{name}{evil}" for name in ("data", "run", "log"))
    prepare(write_jsonl(tmp_path / "a.jsonl", [
        {"instruction": "".join(PAYLOADS), "input": "", "output": "x", "split": "val"},
        {"instruction": "y", "input": "", "output": "y", "split": "train"}]), data)
    flags = ["--data_dir", data, "--checkpoint_dir", run, "--tensorboard_dir", log, "--max_steps", 2,
             "--checkpoint_freq", 1]
    assert train(*flags, "--from_scratch", "1,1,8", "--context_length", 512, "--total_batch_size", 512) == 0
    for name in (LATEST, "step_000002.pt"):
        (run / name).unlink()
        (run / name).write_bytes(b"junk")
    assert train(*flags, "--resume", "latest") == 0
    stdout, stderr = capfd.readouterr()
    assert stdout.count("skipped ") == 2 and not RAW.search(stdout + stderr)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert rb"\x1b[2J" in events and not any(raw in events for raw in (b"\x1b[", b"\x1b]", b"\x1bP", b"\xc2\x9b2J"))


# Prepared data


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its checksums fit."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two train examples of 4 and 3 tokens, one shard a split."""
    examples = [([11, 12, 13, 14], [0, 0, 1, 1]), ([21, 22, 23], [0, 1, 1])]
    return write_data(tmp_path / "data", {"train": examples, "val": examples[:1]})


def check_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=str(folder)) as caught:
        open_data(folder)
    assert caught.value.exit_code == 2


FORGED_MANIFESTS: list[tuple[str, Any]] = [
    *(("name", name) for name in ("../../outside/00000-0123456789abcdef", "/etc/passwd", "00000-0123456789abcde\0",
                                  "00000-0123456789abcdef\n", "", ["x"], "\x1b[2J")),
    *(("tokens", count) for count in (10**30, -1, 7.0, True, float("inf"))), ("sha256", {}), ("sha256", "x"),
    *(("shards", shards) for shards in ({"train": ["x"], "val": []}, {"train": []}, None, [])), ("template", 7),
    *(("format_version", version) for version in ("1", 10**30, "\x1b[2J" * 1000)),
    *(("text", text) for text in ("7", "[]", "null", "{}", "[" * 100_000, "9" * 5000, "\0" * 100)),
]


@pytest.mark.parametrize("key, value", FORGED_MANIFESTS, ids=range(len(FORGED_MANIFESTS)))
def test_a_forged_manifest_is_refused(data, key, value, monkeypatch):
    """Another value of a shard or of the manifest, or another text in its place."""
    if key == "text":
        (data / MANIFEST).write_text(value)
    else:
        of_a_shard = key in ("name", "tokens", "sha256")
        forge(data, lambda manifest: (manifest["shards"]["train"][0] if of_a_shard else manifest).update({key: value}))
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
    check_refused(data)
    assert all(path.resolve().is_relative_to(data.resolve()) for path in opened)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(200)


TOKENS, MASK, STARTS = np.arange(7, dtype=np.uint16), np.array([0, 0, 1, 1, 0, 1, 1], np.uint8), np.array([0, 4])
HARM = Malicious(os.system, "touch executed")
FORGED_ARRAYS: list[tuple[str, Any]] = [  # what stands in the place of an array of the first train shard
    *(("tokens", array) for array in (
        np.array([HARM] * 7, object), pickle.dumps(HARM), b"", npy(TOKENS)[:128],
        *(npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({n},)}}") for n in (-1, 10**30, 2**50)),
        npy_header("(" * 5000 + ")" * 5000), npy_header("open('executed', 'w')"), TOKENS.astype(float), TOKENS[None],
        TOKENS.astype(">u2"), TOKENS[:6], np.array([1, 2, 3, 4, 5, 6, 50257], np.uint16))),
    ("loss_mask", np.append(MASK, np.uint8(1))), ("loss_mask", MASK[:-1]),
    ("starts", np.zeros(2, [("a", np.int64), ("b", object)])),
    *(("starts", np.array(starts, np.int64))
      for starts in (0, [], [0], [0, 7], [0, 2**62], [0, -4], [1, 4], [4, 0], [0, 0])),
]


@pytest.mark.parametrize("kind, content", FORGED_ARRAYS, ids=range(len(FORGED_ARRAYS)))
def test_a_forged_array_is_refused(data, monkeypatch, tmp_path, kind, content):
    """With checksums that fit. What is well-formed is taken."""
    def put(kind: str, content: Any) -> None:
        def change(manifest: dict[str, Any]) -> None:
            shard, data_bytes = manifest["shards"]["train"][0], content if isinstance(content, bytes) else npy(content)
            shard_file(data, "train", shard, kind).write_bytes(data_bytes)
            shard["sha256"][kind] = hashlib.sha256(data_bytes).hexdigest()

        forge(data, change)

    monkeypatch.chdir(tmp_path)
    for well_formed in zip(KINDS, (TOKENS, MASK, STARTS)):
        put(*well_formed)
    assert open_data(data)["train"].example(1).tokens.tolist() == [4, 5, 6]
    put(kind, content)
    check_refused(data)
    assert not Path("executed").exists()
