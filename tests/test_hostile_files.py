"""Files and texts that mean harm: nothing runs, nothing is read outside their folder, and no terminal is driven."""

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convert_checkpoint
import prepare_instruct_dataset
from chat import main as ask
from cli import printable, printable_line
from conftest import SRC, Outcome, write_jsonl
from data.shards import MANIFEST, manifest_bytes, shard_file
from errors import CheckpointError, UserError
from helpers import open_data, prepare, write_data
from model import GPTConfig
from models import small_model, transformers_model
from train_instruct import main as train
from weights.checkpoint import LATEST, load, load_run, save
from weights.pretrained import open_any

ESC = "\x1b"
PAYLOADS = [
    f"{ESC}[2J", f"{ESC}[1A{ESC}[2K", f"{ESC}[31mred{ESC}[0m", f"{ESC}[?1049h", f"{ESC}[6n", f"{ESC}c", f"{ESC}[5i",
    f"{ESC}]0;title\x07", f"{ESC}]52;c;ZXZpbA==\x07", f"{ESC}]8;;http://evil{ESC}\\click{ESC}]8;;{ESC}\\",
    f"{ESC}P+q544e{ESC}\\", f"{ESC}_Gi=31;{ESC}\\", f"{ESC}^x{ESC}\\", f"{ESC}[200~rm{ESC}[201~", f"{ESC}]1337;x\x07",
    "\x9b2J", "\x9d0;title\x9c", "\x90x\x9c", "\x85next", "\x84", "\x07", "over\rwritten", "back\x08\x08space",
    "\x0e\x0f", "\x7f", "\x0b\x0c", "right\u202eleft\u202c", "\u2066isolate\u2069", "mark\u200e\u200f\u061cs",
    "line\u2028break\u2029", "zero\u200bwidth\ufeff\u2060", "soft\xadhyphen", "tag\U000e0041\U000e007f",
    "\x1a\x1c\x1d\x1e\x1f",
]
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                 "\U000e0000-\U000e007f]")


class Malicious:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def run(main: Callable[[list[str]], int], *flags: object) -> int:
    return main([*map(str, flags), "--device", "cpu"])


def test_thirteen_hostile_files_do_nothing(tmp_path):
    """Each would create another, or fill memory, if anything in it were obeyed: by no loader and no command line."""
    executed, weights = tmp_path / "executed", small_model().state_dict()
    code, system = f"open({str(executed)!r}, 'w').close()", Malicious(os.system, f"touch {executed}")
    states = [
        {"model": system}, {"model": Malicious(eval, code)}, {"a": [({"b": Malicious(exec, code)},)]},
        {"model": weights, "config": system}, {"model": weights, "optimizer": {"state": {0: Malicious(eval, code)}}},
        {"model": weights, "x": Malicious(importlib.import_module, "antigravity")},
        {"x": Malicious(subprocess.check_call, ["touch", str(executed)])},
        {"x": Malicious(os.popen, f"touch {executed}")},
        {"format": "gpt2-instruct", "format_version": 1, "model": {}, "x": system}, {"x": system},
    ]
    *saved, bare, traversal, bomb = files = [tmp_path / f"hostile{number}.pt" for number in range(13)]
    for state, path in zip(states, saved):
        torch.save(state, path, _use_new_zipfile_serialization=path != saved[-1])  # once in the format of old
    bare.write_bytes(pickle.dumps(system))
    for path, prefix, pickled, method, size in ((traversal, "../..", system, zipfile.ZIP_STORED, 0),
                                                (bomb, "archive", {}, zipfile.ZIP_DEFLATED, 1 << 28)):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in (("data.pkl", pickle.dumps(pickled)), ("version", "3\n"), ("data/0", bytes(size))):
                archive.writestr(f"{prefix}/{name}", content)
    write_data(tmp_path / "data", {split: [([1, 2], [0, 1])] for split in ("train", "val")})
    folders = [f"--{name}_dir={tmp_path}/{name}" for name in ("data", "checkpoint", "tensorboard")]
    reads: list[Callable[[Path], object]] = [
        load, load_run, open_any, lambda path: run(ask, "--checkpoint", path),
        *(lambda path, flag=flag: run(train, flag, path, *folders) for flag in ("--pretrained_model", "--resume"))]
    for path, read in product(files, reads):
        with pytest.raises(CheckpointError, match=path.name):
            read(path)
    assert not executed.exists()


def test_src_has_no_way_to_unpickle():
    """No files, and nothing between processes: the collectives of objects unpickle what comes from the network."""
    text = "".join(path.read_text() for path in SRC.rglob("*.py"))
    assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.|import pickle|np\.load\(|"
                         r"_object\(|_object_list|torchrun\.main", text)


def forged_parts(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part, values in {
            "position": ["ab", [0, -5], [10**30, 0], None, [0, 4]],  # the last one is beyond the data
            "step": [-5, 10**30], "skipped": ["x"], "data_fingerprint": [7], "optimizer": [7],
            "loss_scale": [0.5, -2.0, 1024, "1024", float("nan")],
            "name": ["../../escaped", "/tmp/escaped", 7, "a\0b", "\x1b[2J"],
            "options": [[1], {"data_dir": "a\0b"}, {"max_steps": "x"}, {"mini_batch_size": -1},
                        {"learning_rate": float("nan")}],
            "model": [{"a": torch.ones(1, device="meta")}, {5: torch.ones(1)}, {"a": torch.zeros(1).expand(1 << 38)},
                      {name: weight.long() for name, weight in state["model"].items()}],
            "model_config": [{**state["model_config"], size: 10**8} for size in ("n_layer", "vocab_size", "n_embd")],
    }.items():
        yield from ({part: value} for value in values)
    moments = state["optimizer"]["state"]
    one = torch.zeros(1).expand_as(moments[0]["exp_avg"])  # AdamW looks neither at shapes nor at strides
    for change in ({"exp_avg": torch.ones(3)}, {"exp_avg_sq": None}, {"exp_avg": one}):
        yield {"optimizer": {**state["optimizer"], "state": {**moments, 0: {**moments[0], **change}}}}
    yield {"optimizer": {**state["optimizer"], "state": {}}}


def test_a_forged_state_is_refused(tmp_path, run_state):
    path = tmp_path / "step_000001.pt"
    save(path, run_state)
    assert run(train, "--resume", path, "--tensorboard_dir", tmp_path) == 0
    for forged in forged_parts(run_state):
        save(path, {**run_state, **forged})
        with pytest.raises(CheckpointError, match=path.name):
            run(train, "--resume", path, "--tensorboard_dir", tmp_path)
            pytest.fail(f"taken: {forged}")


def test_a_run_prints_and_logs_no_payload(tmp_path, capfd):
    """All payloads in the prompts that TensorBoard shows, and in the names of the folders; then a resume that skips."""
    evil = "".join(PAYLOADS).replace("/", "|")[:60]
    data, folder, log = (tmp_path / f"{name}{evil}" for name in ("data", "run", "log"))
    prepare(write_jsonl(tmp_path / "a.jsonl", [
        {"instruction": "".join(PAYLOADS), "input": "", "output": "x", "split": "val"},
        {"instruction": "y", "input": "", "output": "y", "split": "train"}]), data)
    flags = [f"--data_dir={data}", f"--checkpoint_dir={folder}", f"--tensorboard_dir={log}", "--max_steps=2",
             "--checkpoint_freq=1"]
    assert run(train, *flags, "--from_scratch", "1,1,8", "--context_length", 512, "--total_batch_size", 512) == 0
    for name in (LATEST, "step_000002.pt"):
        (folder / name).unlink()
        (folder / name).write_bytes(b"junk")
    assert run(train, *flags, "--resume", "latest") == 0
    stdout, stderr = capfd.readouterr()
    assert stdout.count("skipped ") == 2 and not RAW.search(stdout + stderr)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"&#92;x1b&#91;2J" in events
    assert not any(raw.encode() in events for raw in PAYLOADS if len(raw.encode()) > 3)  # less is there by chance


def forge(folder: Path, key: str, value: Any) -> None:
    """Another array or value of the first shard, another value of the manifest, or another text in its place. Where
    there are checksums, they fit."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    shard = manifest["shards"]["train"][0]
    if isinstance(value, bytes):
        shard_file(folder, "train", shard, key).write_bytes(value)
        key, value = "sha256", {**shard["sha256"], key: hashlib.sha256(value).hexdigest()}
    (shard if key in shard else manifest)[key] = value
    (folder / MANIFEST).write_bytes(value.encode() if key == "text" else manifest_bytes(manifest))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two train examples of 4 and 3 tokens, one shard a split."""
    examples = [([11, 12, 13, 14], [0, 0, 1, 1]), ([21, 22, 23], [0, 1, 1])]
    return write_data(tmp_path / "data", {"train": examples, "val": examples[:1]})


def check_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=str(folder)) as caught:
        open_data(folder)
    assert caught.value.exit_code == 2


FORGED_MANIFESTS = [(key, value) for key, values in {
    "name": ["../../outside/00000-0123456789abcdef", "/etc/passwd", "00000-0123456789abcdef\n", "", ["x"]],
    "tokens": [10**30, -1, True, "x"], "sha256": [{}, "x"], "template": [7],
    "shards": [{"train": ["x"], "val": []}, {"train": []}, None, 7], "format_version": ["1", "\x1b[2J" * 1000],
    "text": ["7", "{}", "[" * 100_000, "9" * 5000, "\0" * 100],
}.items() for value in values]


@pytest.mark.parametrize("key, value", FORGED_MANIFESTS, ids=range(len(FORGED_MANIFESTS)))
def test_a_forged_manifest_is_refused(data, key, value, monkeypatch):
    forge(data, key, value)
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
    check_refused(data)
    assert all(path.resolve().is_relative_to(data.resolve()) for path in opened)


@pytest.mark.parametrize("name", [MANIFEST, "train/*.tokens.npy", "val/*.starts.npy"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_data_that_are_no_regular_file_are_refused(data, name, make):
    """A pipe or a device may have no end, and reading it none either."""
    [path] = data.glob(name)
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=f"{path}: not a regular file; prepare the data again"):
        open_data(data)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


TOKENS, HARM = np.arange(7, dtype=np.uint16), Malicious(os.system, "touch executed")
WELL_FORMED = {"tokens": TOKENS, "loss_mask": np.array([0, 0, 1, 1, 0, 1, 1], np.uint8), "starts": np.array([0, 4])}
FORGED_ARRAYS = [(kind, file) for kind, files in {
    "tokens": [
        pickle.dumps(HARM), b"", npy(TOKENS)[:128],
        b"\x93NUMPY\x01\x00" + (10_000).to_bytes(2, "little") + b"(" * 5000 + b")" * 5000,
        *(npy(TOKENS).replace(b"(7,), }".ljust(50), f"{shape}, }}".ljust(50).encode())
          for shape in ((-1,), (10**30,), (2**50,), "open('executed', 'w')")),
        *map(npy, (np.array([HARM] * 7, object), np.zeros(7, [("a", "<u2"), ("b", object)]), TOKENS.astype(float),
                   TOKENS.astype(">u2"), TOKENS[None], TOKENS[:6]))],
    "loss_mask": [npy(np.ones(size, np.uint8)) for size in (6, 8)],
    "starts": [npy(np.array(starts, np.int64)) for starts in (0, [], [0])],
}.items() for file in files]


@pytest.mark.parametrize("kind, file", FORGED_ARRAYS, ids=range(len(FORGED_ARRAYS)))
def test_a_forged_array_is_refused(data, monkeypatch, tmp_path, kind, file):
    monkeypatch.chdir(tmp_path)
    for well_formed, array in WELL_FORMED.items():
        forge(data, well_formed, npy(array))
    assert open_data(data)["train"].example(1).tokens.tolist() == [4, 5, 6]
    forge(data, kind, file)
    check_refused(data)
    assert not Path("executed").exists()


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_preparation_prints_no_payload(tmp_path, run_main, payload):
    """In the fields of a sample, in its file's name and folder, in a column's name, in a bad value, in a bad line."""
    assert RAW.search(payload) and not RAW.search(printable(payload)) and len(printable(payload)) > len(payload)
    row = {name: f"{name}{payload}!" for name in ("instruction", "input", "output")}
    name = payload.replace("/", "|")
    folder = tmp_path / f"x{name}"
    folder.mkdir()

    def prepare(path: Path) -> Outcome:
        return run_main(prepare_instruct_dataset.main, "--dataset", path, "--output_dir", folder / "out")

    rows = [{**row, "split": "train"}, {**row, "instruction": "", "split": "val"}]
    code, out, _ = prepare(write_jsonl(folder / f"y{name}.jsonl", rows))
    assert code == 0 and not RAW.search(out) and f"wrote {printable_line(folder)}/out/" in out
    assert all(printable(text) in out for text in row.values())
    wrong = [{f"z{payload}": 1}, {**row, "split": payload}, {**row, "output": 7}]
    paths = [write_jsonl(folder / f"{number}{name}.jsonl", [row]) for number, row in enumerate(wrong)]
    paths += [folder / f"line{name}.jsonl", folder / f"kind{name}.txt", folder / f"missing{name}.jsonl"]
    for path in paths[-3:-1]:
        path.write_text(payload + "{\n", encoding="utf-8")
    assert not RAW.search("".join(prepare(path).refusal() for path in paths))


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "/" not in payload], ids=ascii)
def test_an_import_prints_no_payload(tmp_path, run_main, payload):
    """File names, and names and values of a foreign configuration."""
    folder, output = tmp_path / f"x{payload}", tmp_path / f"y{payload}.pt"
    transformers_model(small_model(config=GPTConfig(8, 50257, 1, 1, 8))).save_pretrained(folder)
    config, flags = folder / "config.json", ("import", folder, "--output", output)
    code, out, err = run_main(convert_checkpoint.main, *flags)
    assert (code, err) == (0, "") and printable_line(output) in out
    said = [out, run_main(convert_checkpoint.main, *flags).refusal()]
    for text, code in ((config.read_text().replace('"gpt2"', json.dumps(payload)), 3), ("junk", 2)):
        config.write_text(text)
        said.append(run_main(convert_checkpoint.main, *flags, "--force").refusal(code))
    assert not RAW.search("".join(said))
