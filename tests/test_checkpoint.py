"""Checkpoints: what is saved is loaded, and a run's folder, whose files are whole or absent."""

import os
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import train_instruct
from errors import UserError
from weights.checkpoint import load, model_of, save, save_step, step_files


@pytest.fixture
def state_of(run_state):
    return lambda step: {**run_state, "step": step}


def test_steps_are_kept_by_number_and_foreign_files_are_left_alone(tmp_path, state_of):
    """A run that went back keeps what it saves."""
    foreign, kept = ["best_model.pt", "notes.txt", "step_5.pt", "step_x.pt"], ["step_1000001.pt", "step_1000000.pt"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_step(tmp_path, state_of(step), keep_last=2)
    assert [path.name for path in step_files(tmp_path)] == kept
    save_step(tmp_path, state_of(3), keep_last=1)
    assert [path.name for path in step_files(tmp_path)] == [*kept, "step_000003.pt"]
    assert load(tmp_path / "latest.pt")["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "latest.pt", *kept, "step_000003.pt"}


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_in_a_smaller_type_becomes_fp32(state_of, tmp_path):
    """As a user may have made it, to pass it on: in its own type training would round most updates away."""
    state = state_of(1)
    state["model"] = {name: tensor.bfloat16() for name, tensor in state["model"].items()}
    assert {parameter.dtype for parameter in model_of(state, tmp_path).parameters()} == {torch.float32}


def test_without_hard_links_latest_is_a_copy(tmp_path, state_of, monkeypatch):
    save_step(tmp_path, state_of(3), keep_last=2)
    os.link(tmp_path / "step_000003.pt", tmp_path / "latest.pt.tmp")  # left by a kill between two calls
    monkeypatch.setattr(os, "link", refuse)
    save_step(tmp_path, state_of(4), keep_last=1)
    assert load(tmp_path / "latest.pt")["step"] == 4 == load(tmp_path / "step_000004.pt")["step"]


@pytest.mark.parametrize("limit, reason", [(4096, "File too large"), (None, "No space left on device")])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, state_of, monkeypatch, limit, reason):
    """In a write, where torch.save raises an error of its own after the disk's, and in the sync."""
    path, (soft, hard) = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, state_of(1))
    before = path.read_bytes()
    if limit is None:
        monkeypatch.setattr(os, "fsync", refuse)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
    try:
        with pytest.raises(UserError, match=rf"a.pt: cannot write it: {reason} \([\d,]+ bytes are needed, "):
            save(path, state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("folder_mode, file_mode, name", [
    (0o700, 0o644, "latest.pt"), (0o777, 0o600, "latest.pt"), (0o777, 0o600, "--resume auto"),
    (0o777, 0o644, "x" * 300)])
def test_what_may_not_be_read_is_one_line_and_not_called_damaged(run_state, run_main, folder_mode, file_mode, name):
    """Root reads everything, so it becomes another user, for whom what is left of the modes is nothing."""
    is_root = os.geteuid() == 0
    with TemporaryDirectory(dir="/tmp") as folder:
        path, said = Path(folder) / name, "File name too long" if len(name) > 255 else "Permission denied"
        save_step(path.parent, run_state, keep_last=1)
        for each in path.parent.iterdir():
            each.chmod(file_mode & (0o777 if is_root else 0o077))
        path.parent.chmod(folder_mode if is_root or folder_mode == 0o777 else 0)
        if is_root:
            os.setresuid(65534, 65534, 0)
        try:
            if name == "--resume auto":
                path = path.with_name("latest.pt")
                outcome = run_main(train_instruct.main, "--checkpoint_dir", folder, *name.split())
            else:
                outcome = run_main(lambda _: len(load(path)))
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
            path.parent.chmod(0o700)
    assert outcome.refusal() == f"error: {path}: {said}\n"
