"""Checkpoints: what is saved is loaded, and a run's folder, whose files are whole or absent."""

import os
import resource
import zipfile

import pytest
import torch

from conftest import write_checkpoint
from errors import CheckpointError, UserError
from helpers import same_state, small_model
from weights.checkpoint import load, model_of, newest_valid, save, save_step, step_files


def test_what_is_saved_is_loaded(tmp_path):
    model = small_model()
    path = write_checkpoint(tmp_path / "a.pt", step=7, model_config=vars(model.config), model=model.state_dict())
    state = load(path)
    assert state["step"] == 7 and zipfile.ZipFile(path).testzip() is None  # any zip reader reads it
    assert same_state(dict(model_of(state, path, torch.device("cpu")).state_dict()), dict(model.state_dict()))


# The files of a run


@pytest.fixture
def state_of(run_state):
    return lambda step: {**run_state, "step": step}


def test_steps_are_kept_by_number_and_foreign_files_are_left_alone(tmp_path, state_of):
    foreign, kept = ["best_model.pt", "notes.txt", "step_5.pt", "step_x.pt"], ["step_1000001.pt", "step_1000000.pt"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_step(tmp_path, state_of(step), keep_last=2)
    assert [path.name for path in step_files(tmp_path)] == kept
    assert load(tmp_path / "latest.pt")["step"] == 1_000_001
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "latest.pt", *kept}


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path, state_of):
    for step, keep_last in ((1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (3, 2)):
        save_step(tmp_path, state_of(step), keep_last)
    assert [int(path.stem[-6:]) for path in step_files(tmp_path)] == [5, 4, 3, 2]
    assert load(tmp_path / "latest.pt")["step"] == 3


def test_latest_falls_back_to_the_newest_valid_file_and_says_so(tmp_path, state_of):
    for step in (1, 2, 3):
        save_step(tmp_path, state_of(step), keep_last=3)
    told: list[str] = []
    latest, newest = tmp_path / "latest.pt", tmp_path / "step_000003.pt"
    os.truncate(newest, 4000)  # latest.pt is the same file, as where a bad sector strikes
    path, state = newest_valid(tmp_path, told.append)
    assert (path.name, state["step"]) == ("step_000002.pt", 2)
    assert told == [f"skipped {path}: damaged or not loadable" for path in (latest, newest)]
    for file in tmp_path.glob("*.pt"):
        os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="none of its 4 checkpoints is valid"):
        newest_valid(tmp_path, told.append)


def test_a_folder_without_checkpoints_is_a_user_error(tmp_path):
    for read, message in ((lambda: newest_valid(tmp_path, print), "no checkpoint to resume from"),
                          (lambda: load(tmp_path / "absent.pt"), "no such file")):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert caught.value.exit_code == 2


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


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
