"""Damage to files: 300 flipped bits, 60 truncations and 50 zeroed pages of checkpoints, and as many of prepared data.

Every damage changes at least one byte: a page that holds zeros already is not taken.
"""

from __future__ import annotations

import os
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import chat
from checkpoint import BEST, LATEST, load, load_pretrained, newest_valid, save, save_step, settle
from cli import CheckpointError, UserError
from conftest import run_script
from helpers import open_data, random_examples, small_model, write_data, write_pretrained
from instruct_format import TEMPLATE
from manifest import MANIFEST
from model import GPTConfig
from resume import state_to_resume

PAGE = 4096
DAMAGES = {"flip": 300, "cut": 60, "zero": 50}


def damaged(data: bytes, kind: str, chance: random.Random) -> bytes:
    if kind == "cut":
        return data[:chance.randrange(len(data))]
    changed = bytearray(data)
    while changed == data:
        if kind == "flip":
            bit = chance.randrange(8 * len(data))
            changed[bit // 8] ^= 1 << (bit % 8)
        else:
            page = chance.randrange(0, len(data), PAGE)
            changed[page:page + PAGE] = bytes(len(data[page:page + PAGE]))
    return bytes(changed)


def damages(files: list[Path], counts: dict[str, int] = DAMAGES, seed: int = 0) -> Iterator[tuple[Path, bytes]]:
    """(file, its damaged bytes), the files in turn."""
    chance = random.Random(seed)
    originals = {path: path.read_bytes() for path in files}
    for kind, count in counts.items():
        for number in range(count):
            path = files[number % len(files)]
            yield path, damaged(originals[path], kind, chance)


def run_state(step: int) -> dict:
    """The complete state of a run with a model small enough to be loaded a thousand times."""
    model = small_model(step, GPTConfig(context_length=16, vocab_size=64, n_layer=1, n_head=1, n_embd=16))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.pow(2).sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {"step": step, "position": [0, 0], "skipped": 0, "val_losses": [[step, 4.25]], "name": "a", "options": {},
            "template": TEMPLATE, "data_fingerprint": "", "model_config": vars(model.config),
            "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def write_folder(folder: Path) -> list[Path]:
    """latest.pt, step_000003.pt and best_model.pt, three files of their own, and an older step_000002.pt."""
    folder.mkdir()
    settle(save_step(folder, run_state(2)), keep_last=2)
    settle(save_step(folder, run_state(3)), keep_last=2)
    save(folder / BEST, {key: value for key, value in run_state(3).items() if key != "optimizer"})
    files = [folder / LATEST, folder / "step_000003.pt", folder / BEST]
    for path in files:
        data = path.read_bytes()
        path.unlink()  # the hard link: a damage shall strike one name
        path.write_bytes(data)
    return files


def resumed(folder: Path, resume: str) -> tuple[Path, dict | None]:
    return state_to_resume(Namespace(resume=resume), folder, True)


def test_410_damages_to_checkpoints_are_noticed_by_resume_and_by_chat(tmp_path, capsys):
    """Named, exit code 3; `--resume latest` falls back to the newest valid file and says what it skipped."""
    files = write_folder(tmp_path / "run")
    originals = {path: path.read_bytes() for path in files}
    noticed = {path.name: 0 for path in files}
    for path in files:  # what is not damaged loads
        load(path)
        load_pretrained(path)
        chat.open_chat(chat.parse_options(["--checkpoint", str(path), "--device", "cpu"]))
    for path, data in damages(files):
        path.write_bytes(data)
        readers = [lambda path=path: load(path), lambda path=path: load_pretrained(path),
                   lambda path=path: resumed(path.parent, str(path)),
                   lambda path=path: chat.open_chat(chat.parse_options(["--checkpoint", str(path)]))]
        for read in readers:
            with pytest.raises(CheckpointError, match=path.name) as caught:
                read()
            assert caught.value.exit_code == 3
        told: list[str] = []
        found, state = newest_valid(path.parent, told.append)
        expected = "step_000003.pt" if path.name == LATEST else LATEST
        assert (found.name, state["step"]) == (expected, 3)
        assert told == ([f"skipped {path}: damaged or not loadable"] if path.name == LATEST else [])
        path.write_bytes(originals[path])
        noticed[path.name] += 1
    assert noticed == {LATEST: 137, "step_000003.pt": 137, BEST: 136} and sum(noticed.values()) == 410


def test_latest_and_its_step_file_damaged_together_fall_back_to_the_step_before(tmp_path):
    """They are one file where the file system has hard links, so this is what a bad sector does."""
    latest, step, _ = write_folder(tmp_path / "run")
    for path in (latest, step):
        os.truncate(path, 5000)
    told: list[str] = []
    found, state = newest_valid(tmp_path / "run", told.append)
    assert (found.name, state["step"]) == ("step_000002.pt", 2)
    assert told == [f"skipped {path}: damaged or not loadable" for path in (latest, step)]
    os.truncate(found, 5000)
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is valid"):
        newest_valid(tmp_path / "run", told.append)


def write_set(folder: Path) -> list[Path]:
    """Prepared data whose arrays are larger than a page. Returns its files."""
    write_data(folder, {"train": random_examples(1100, 30), "val": random_examples(600, 30, seed=1)})
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_410_damages_to_prepared_data_are_noticed(tmp_path):
    """Named, exit code 2: six arrays and the manifest, every byte of it."""
    files = write_set(tmp_path / "data")
    assert [path.name for path in files].count(MANIFEST) == 1 and len(files) == 7
    open_data(tmp_path / "data")
    originals = {path: path.read_bytes() for path in files}
    noticed = 0
    for path, data in damages(files):
        path.write_bytes(data)
        with pytest.raises(UserError, match=path.name) as caught:
            open_data(tmp_path / "data")
        assert caught.value.exit_code == 2
        path.write_bytes(originals[path])
        noticed += 1
    assert noticed == 410
    open_data(tmp_path / "data")


@pytest.mark.slow
def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    """All of them: also in the words that training does not use, and in its white space."""
    write_data(tmp_path, {"train": [([1, 2], 1)], "val": [([1, 2], 1)]})
    path = tmp_path / MANIFEST
    original = path.read_bytes()
    for bit in range(8 * len(original)):
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=MANIFEST):
            open_data(tmp_path)


def trainer(tmp_path: Path, *flags: str | Path) -> tuple[int, str, str]:
    return run_script("train_instruct.py", "--data_dir", tmp_path / "data", "--context_length", "64",
                      "--total_batch_size", "64", "--max_steps", "3", "--checkpoint_freq", "1", "--device", "cpu",
                      "--tensorboard_dir", tmp_path / "runs", "--checkpoint_dir", tmp_path / "run", *flags)


@pytest.mark.parametrize("script, flag", [("train_instruct.py", "--resume"), ("chat.py", "--checkpoint")])
def test_the_command_lines_refuse_a_damaged_file(tmp_path, script, flag):
    path = write_folder(tmp_path / "run")[1]
    path.write_bytes(damaged(path.read_bytes(), "flip", random.Random(1)))
    code, stdout, stderr = run_script(script, flag, path)
    assert (code, stdout, stderr.count("\n")) == (3, "", 1)
    assert stderr.startswith(f"error: {path}: ")


@pytest.mark.slow
def test_a_run_resumes_past_damage_and_stops_at_damaged_data(tmp_path):
    """Training resumes from the newest valid file and says which it skipped; damaged data are exit code 2."""
    files = write_set(tmp_path / "data")
    pretrained = write_pretrained(tmp_path / "pretrained.pt", small_model())
    code, _, stderr = trainer(tmp_path, "--pretrained_model", pretrained)
    assert code == 0, stderr
    run = tmp_path / "run"
    for name in (LATEST, "step_000003.pt"):  # one file with two names, or two files
        data = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).write_bytes(damaged(data, "flip", random.Random(1)))
    shard = next(path for path in files if path.name.endswith(".tokens.npy"))
    original = shard.read_bytes()
    shard.write_bytes(damaged(original, "zero", random.Random(1)))
    code, _, stderr = trainer(tmp_path, "--resume", "latest")
    assert (code, stderr.count("\n"), f"{shard}: damaged or changed" in stderr) == (2, 1, True)
    shard.write_bytes(original)
    code, stdout, stderr = trainer(tmp_path, "--resume", "latest")
    assert code == 0, stderr
    for name in (LATEST, "step_000003.pt"):
        assert f"skipped {run}/{name}: damaged or not loadable\n" in stdout
    assert f"resumed from {run}/step_000002.pt at step 2" in stdout and load(run / LATEST)["step"] == 3
