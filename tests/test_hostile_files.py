"""Files that mean harm: nothing in them runs, nothing outside their folder is touched, and they are told in one line."""

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
import prepare_instruct_dataset
import train_instruct
from cli import printable_line
from conftest import SRC, run_script, write_jsonl
from data.shards import KINDS, MANIFEST, manifest_bytes, shard_file
from errors import CheckpointError, UserError
from helpers import open_data, small_model, write_data, write_pretrained
from model import GPTConfig
from test_hostile_texts import PAYLOADS, RAW
from weights.checkpoint import LATEST, load, load_run, save
from weights.pretrained import load_pretrained

# Checkpoints


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
    for name, prefix, zeros in (("path traversal", "../..", 0), ("a zip bomb", "archive", 1 << 28)):
        with zipfile.ZipFile(files[name], "w", zipfile.ZIP_DEFLATED if zeros else zipfile.ZIP_STORED) as archive:
            for entry, content in ((f"data.pkl", pickle.dumps(states[name])), ("version", b"3\n"), ("data/0", bytes(zeros))):
                archive.writestr(f"{prefix}/{entry}", content)
    return files


def test_thirteen_hostile_files_do_nothing(tmp_path):
    files = hostile_files(tmp_path, tmp_path / "executed")
    assert len(files) == 13
    for path in files.values():
        for read in (load, load_run, load_pretrained, lambda path: chat.main(["--checkpoint", str(path)]),
                     lambda path: train_instruct.main(["--resume", str(path)])):
            with pytest.raises(CheckpointError, match=path.name):
                read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("script, flag, name", [("train_instruct.py", "--pretrained_model", "os.system"),
                                                ("train_instruct.py", "--resume", "optimizer"),
                                                ("chat.py", "--checkpoint", "exec, nested")])
def test_no_command_line_runs_a_hostile_file(tmp_path, script, flag, name):
    victim = tmp_path / "executed"
    path = hostile_files(tmp_path, victim)[name]
    flags = [flag, path]
    if flag == "--pretrained_model":
        data = write_data(tmp_path / "data", {"train": [([1, 2], [0, 1])], "val": [([1, 2], [0, 1])]})
        flags += ["--data_dir", data, "--checkpoint_dir", tmp_path / "run"]
    code, stdout, stderr = run_script(script, *flags)
    assert (code, stdout, stderr.count("\n")) == (3, "", 1)
    assert stderr.startswith(f"error: {path}: ") and not victim.exists()


def test_src_has_no_way_to_unpickle():
    text = "".join(path.read_text() for path in SRC.rglob("*.py"))
    assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.|import pickle|np\.load\(", text)


# The state of a run


@pytest.fixture(scope="module")
def run_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a run of one step, with a model of one layer."""
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data", {"train": [([1, 2], [0, 1])] * 3, "val": [([1, 2], [0, 1])]})
    pretrained = write_pretrained(folder / "a.pt", small_model(config=GPTConfig(16, 64, 1, 1, 16)))
    assert train_instruct.main([
        "--data_dir", str(data), "--pretrained_model", str(pretrained), "--max_steps", "1", "--device", "cpu",
        "--checkpoint_dir", str(folder), "--tensorboard_dir", str(folder / "runs")]) == 0
    return load_run(folder / LATEST)


def with_moments(**changes: torch.Tensor | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        moments = {**state["optimizer"]["state"], 0: {**state["optimizer"]["state"][0], **changes}}
        return {"optimizer": {**state["optimizer"], "state": moments}}

    return change


FORGED_STATES: dict[str, Any] = {
    "position of another type": {"position": "ab"}, "negative position": {"position": [0, -5]},
    "huge position": {"position": [10**30, 0]}, "no position": {"position": None},
    "position beyond the data": {"position": [0, 4]},
    "name that leads outside": {"name": "../../escaped"}, "absolute name": {"name": "/tmp/escaped"},
    "name of another type": {"name": 7}, "name with NUL": {"name": "a\0b"}, "name for a terminal": {"name": "\x1b[2J"},
    "negative step": {"step": -5}, "huge step": {"step": 10**30}, "skipped is text": {"skipped": "x"},
    "options are a list": {"options": [1]}, "option of another type": {"options": {"max_steps": "x"}},
    "option out of bounds": {"options": {"mini_batch_size": -1}},
    "option NaN": {"options": {"learning_rate": float("nan")}},
    "fingerprint of another type": {"data_fingerprint": 7},
    "weights that are whole numbers": lambda state: {"model": {k: v.long() for k, v in state["model"].items()}},
    "weights of another kind": {"model": {"a": torch.ones(1, device="meta")}},
    "numbered weights": {"model": {5: torch.ones(1)}},
    "a terabyte of four bytes": {"model": {"a": torch.zeros(1).expand(1 << 38)}},
    **{f"huge {size}": lambda state, size=size: {"model_config": {**state["model_config"], size: 10**8}}
       for size in ("n_layer", "vocab_size", "n_embd")},
    "optimizer of another type": {"optimizer": 7}, "no moments": lambda state: {
        "optimizer": {**state["optimizer"], "state": {}}},
    # fused AdamW would read and write beyond them
    "moments of another shape": with_moments(exp_avg=torch.ones(3)), "a moment less": with_moments(exp_avg_sq=None),
}


@pytest.mark.parametrize("case", FORGED_STATES)
def test_a_forged_state_is_refused(tmp_path, run_state, case):
    path, change = tmp_path / "step_000001.pt", FORGED_STATES[case]
    flags = ["--resume", str(path), "--device", "cpu", "--tensorboard_dir", str(tmp_path / "runs")]
    save(path, run_state)
    assert train_instruct.main(flags) == 0
    save(path, {**run_state, **(change(run_state) if callable(change) else change)})
    with pytest.raises(CheckpointError, match=path.name):
        train_instruct.main(flags)


def test_a_run_prints_and_logs_no_payload(tmp_path, capfd):
    """All payloads in the prompts that TensorBoard shows, and in the names of the folders; then a resume that skips."""
    evil = "".join(PAYLOADS).replace("/", "|")[:60]
    data, run, log = (str(tmp_path / f"{name}{evil}") for name in ("data", "run", "log"))
    source = write_jsonl(tmp_path / "a.jsonl", [
        {"instruction": "".join(PAYLOADS), "input": "", "output": "x", "split": "val"},
        {"instruction": "y", "input": "", "output": "y", "split": "train"}])
    assert prepare_instruct_dataset.main(["--dataset", str(source), "--output_dir", data]) == 0
    capfd.readouterr()
    flags = ["--data_dir", data, "--checkpoint_dir", run, "--tensorboard_dir", log, "--device", "cpu", "--max_steps", "2",
             "--checkpoint_freq", "1"]
    assert train_instruct.main([*flags, "--from_scratch", "1,1,8", "--context_length", "512", "--total_batch_size",
                                "512"]) == 0
    for name in (LATEST, "step_000002.pt"):
        (Path(run) / name).unlink()
        (Path(run) / name).write_bytes(b"junk")
    assert train_instruct.main([*flags, "--resume", "latest"]) == 0
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
    with pytest.raises(UserError) as caught:
        open_data(folder)
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value) and "\n" not in printable_line(caught.value)


FORGED_SHARDS: dict[str, Any] = {
    "traversal": {"name": "../../outside/00000-0123456789abcdef"}, "absolute name": {"name": "/etc/passwd"},
    "NUL in a name": {"name": "00000-0123456789abcde\0"}, "newline after a name": {"name": "00000-0123456789abcdef\n"},
    "empty name": {"name": ""}, "name of another type": {"name": ["x"]}, "name for a terminal": {"name": "\x1b[2J"},
    "huge count": {"tokens": 10**30}, "negative count": {"examples": -1}, "count that is a float": {"tokens": 7.0},
    "count that is true": {"examples": True}, "infinite count": {"tokens": float("inf")},
    "no SHA-256": {"sha256": {}}, "SHA-256 is text": {"sha256": "x"},
}
FORGED_MANIFESTS: dict[str, Any] = {
    **{name: {"shards": shards} for name, shards in {
        "a shard is text": {"train": ["x"], "val": []}, "no val split": {"train": []}, "shards is null": None,
        "shards is a list": []}.items()},
    "template of another type": {"template": 7}, "format of another type": {"format_version": "1"},
    "huge format": {"format_version": 10**30}, "format for a terminal": {"format_version": "\x1b[2J" * 1000},
}


@pytest.mark.parametrize("case", [*FORGED_SHARDS, *FORGED_MANIFESTS])
def test_a_forged_manifest_is_refused(data, case, monkeypatch):
    forge(data, lambda manifest: manifest["shards"]["train"][0].update(FORGED_SHARDS[case])
          if case in FORGED_SHARDS else manifest.update(FORGED_MANIFESTS[case]))
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
    check_refused(data)
    assert all(path.resolve().is_relative_to(data.resolve()) for path in opened)


@pytest.mark.parametrize("text", ["7", "[]", "null", '"x"', "{}", "[" * 100_000, '{"format_version": ' + "9" * 5000,
                                  '{"format_version": 1, "shards": {}}', "\0" * 100], ids=range(9))
def test_a_manifest_that_is_something_else_is_refused(data, text):
    (data / MANIFEST).write_text(text)
    check_refused(data)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(200)


def npy_of_length(length: int) -> bytes:
    return npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({length},)}}")


TOKENS, MASK = np.arange(7, dtype=np.uint16), np.array([0, 0, 1, 1, 0, 1, 1], np.uint8)
HARM = Malicious(os.system, "touch executed")
ARRAYS: dict[str, tuple[str, Any]] = {  # what stands in the place of an array of the first train shard
    "objects": ("tokens", np.array([HARM] * 7, object)), "a pickle": ("tokens", pickle.dumps(HARM)),
    "objects in a structure": ("starts", np.zeros(2, [("a", np.int64), ("b", object)])),
    "empty": ("tokens", b""), "header alone": ("tokens", npy(TOKENS)[:128]),
    "negative length": ("tokens", npy_of_length(-1)), "huge length": ("tokens", npy_of_length(10**30)),
    "petabytes": ("tokens", npy_of_length(2**50)), "deep header": ("tokens", npy_header("(" * 5000 + ")" * 5000)),
    "code in the header": ("tokens", npy_header("open('executed', 'w')")),
    "float tokens": ("tokens", TOKENS.astype(float)), "two dimensions": ("tokens", TOKENS[None]),
    "big-endian": ("tokens", TOKENS.astype(">u2")), "too few tokens": ("tokens", TOKENS[:6]),
    "token above the vocabulary": ("tokens", np.array([1, 2, 3, 4, 5, 6, 50257], np.uint16)),
    "mask longer": ("loss_mask", np.append(MASK, np.uint8(1))), "mask shorter": ("loss_mask", MASK[:-1]),
    "no dimension": ("starts", np.array(0)),
    **{f"starts {starts}": ("starts", np.array(starts, np.int64))
       for starts in ([], [0], [0, 7], [0, 2**62], [0, -4], [1, 4], [4, 0], [0, 0])},
}


def put_array(folder: Path, kind: str, content: Any) -> None:
    """Replace an array of the first train shard and make the checksums fit."""
    content = content if isinstance(content, bytes) else npy(content)

    def change(manifest: dict[str, Any]) -> None:
        shard = manifest["shards"]["train"][0]
        shard_file(folder, "train", shard, kind).write_bytes(content)
        shard["sha256"][kind] = hashlib.sha256(content).hexdigest()

    forge(folder, change)


@pytest.mark.parametrize("case", ARRAYS)
def test_a_forged_array_is_refused(data, monkeypatch, tmp_path, case):
    monkeypatch.chdir(tmp_path)
    for kind, array in zip(KINDS, (TOKENS, MASK, np.array([0, 4]))):
        put_array(data, kind, array)
    assert open_data(data)["train"].example(1).tokens.tolist() == [4, 5, 6]  # what is well-formed is taken
    put_array(data, *ARRAYS[case])
    check_refused(data)
    assert not Path("executed").exists()
