"""A run's folder: what is saved is loaded, files are whole or absent, the disk may be full or lack something, and what
others put there stays; the log."""

import errno
import fcntl
import os
import resource
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
import torch

import train_instruct
from conftest import write_jsonl
from data.shards import MANIFEST
from data_files import row
from errors import UserError
from helpers import files_of, open_data, prepare, resume, train
from models import options_of
from training import setup
from training.log import RunLog
from training.progress import Progress, say
from training.samples import Sample
from weights import checkpoint
from weights.checkpoint import load, model_of, save, save_step, step_files
from weights.durable import LOCK


def refusing(code: int, real: Callable | None = None) -> Callable:
    """A call that the file system refuses; with a real one, for folders only."""
    def call(*arguments: object) -> object:
        if real and not os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
            return real(*arguments)
        raise OSError(code, os.strerror(code))
    return call


def test_steps_are_kept_by_number_and_foreign_files_are_left_alone(tmp_path, run_state):
    """A run that went back keeps what it saves."""
    foreign, kept = ["best_model.pt", "notes.txt", "step_5.pt", "step_x.pt"], ["step_1000001.pt", "step_1000000.pt"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_step(tmp_path, {**run_state, "step": step}, keep_last=2)
    assert [path.name for path in step_files(tmp_path)] == kept
    save_step(tmp_path, {**run_state, "step": 3}, keep_last=1)
    assert [path.name for path in step_files(tmp_path)] == [*kept, "step_000003.pt"]
    assert load(tmp_path / "latest.pt")["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "latest.pt", *kept, "step_000003.pt"}


def test_a_checkpoint_in_a_smaller_type_becomes_fp32(run_state, tmp_path):
    """As a user may have made it, to pass it on: in its own type training would round most updates away."""
    state = {**run_state, "model": {name: tensor.bfloat16() for name, tensor in run_state["model"].items()}}
    assert {parameter.dtype for parameter in model_of(state, tmp_path).parameters()} == {torch.float32}


def test_without_hard_links_latest_is_a_copy(tmp_path, run_state, monkeypatch):
    save_step(tmp_path, {**run_state, "step": 3}, keep_last=2)
    os.link(tmp_path / "step_000003.pt", tmp_path / "latest.pt.tmp")  # left by a kill between two calls
    monkeypatch.setattr(os, "link", refusing(errno.ENOTSUP))
    save_step(tmp_path, {**run_state, "step": 4}, keep_last=1)
    assert load(tmp_path / "latest.pt")["step"] == 4 == load(tmp_path / "step_000004.pt")["step"]


@pytest.mark.parametrize("limit, reason", [(4096, r"File too large \([\d,]+ bytes are needed, "),
                                           (None, r"No space left on device \([\d,]+ bytes are needed, "),
                                           (0, "Read-only file system$")])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, run_state, monkeypatch, limit, reason):
    """In a write, where torch.save raises an error of its own after the disk's, and in the sync."""
    path, (soft, hard) = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, run_state)
    before = path.read_bytes()
    if not limit:
        monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC if limit is None else errno.EROFS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
    try:
        with pytest.raises(UserError, match=f"a.pt: cannot write it: {reason}"):
            save(path, {**run_state, "step": 2})
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


@pytest.mark.parametrize("free, warns", [(4 * 10**6, False), (3 * 10**6, True)])
def test_a_run_warns_when_there_is_no_room_for_its_checkpoints(inputs, tmp_path, monkeypatch, capsys, free, warns):
    """Three step files and best_model.pt of a model with 362,112 bytes of weights: 3,621,120 bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    assert train(inputs, tmp_path, "--max_steps", 1, "--keep_last", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ") and "room" in line]
    said = "3 step files and best_model.pt need 3,621,120 bytes, there is room for 3,000,000"
    assert [said in line for line in warnings] == [True] * warns


def test_what_a_killed_save_left_is_removed(tmp_path):
    """And nothing else: neither another name, nor what was not written by a save."""
    for name in ("step_000003.pt.tmp", "latest.pt.tmp", "best_model.pt.tmp", "notes.tmp", "step_000002.pt"):
        (tmp_path / name).write_text("")
    checkpoint.save(tmp_path / "ours", {})
    (tmp_path / "step_000004.pt.tmp").write_bytes((tmp_path / "ours").read_bytes()[:600])
    for name in ("mine.pt.tmp", "step_000005.pt.tmp", "step_5.pt.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "step_000006.pt.tmp").symlink_to(tmp_path / "ours")
    os.mkfifo(tmp_path / "step_000007.pt.tmp")
    checkpoint.remove_temporaries(tmp_path)
    assert {path.name.removesuffix(".pt.tmp") for path in tmp_path.iterdir()} == {
        "notes.tmp", "step_000002.pt", "ours", "mine", "step_000005", "step_5", "step_000006", "step_000007"}


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "train/embeddings.npy": lambda path: path.write_text("mine"), "val/notes.txt": lambda path: path.write_text("mine"),
    "train/00000-0123.tokens.npy": lambda path: path.write_text("mine"), "val/more": Path.mkdir,
    "train": link("elsewhere"), "val": link("absent"), MANIFEST: lambda path: path.write_text('{"builder_name": "x"}'),
    LOCK: lambda path: path.write_text("mine")}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_preparation_refuses_a_folder_that_holds_anything_else(tmp_path, name):
    """Naming it. All that was there stays, also what lies where a link leads."""
    data = write_jsonl(tmp_path / "a.jsonl", map(row, range(40)))
    prepare(data, tmp_path / "out" / "elsewhere")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    FOREIGN[name](tmp_path / "out" / name)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=f"/out/{name}: not (of a preparation by|a lock of) this program"):
        prepare(data, tmp_path / "out")
    assert files_of(tmp_path).items() >= before.items()


def test_a_preparation_leaves_hidden_files_and_replaces_a_damaged_manifest(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", map(row, range(40)))
    prepare(data, tmp_path / "out")
    (tmp_path / "out/train/.DS_Store").write_text("the system's")
    (tmp_path / "out" / MANIFEST).write_bytes((tmp_path / "out" / MANIFEST).read_bytes()[:700])
    prepare(data, tmp_path / "out", "--val_fraction", 0.3)
    assert (tmp_path / "out/train/.DS_Store").exists() and len(list((tmp_path / "out/train").iterdir())) == 4


def test_a_run_replaces_and_removes_its_own_files_only(inputs, tmp_path):
    """In its folder are files of its names: where it would write one it has another name afterwards."""
    folder = tmp_path / "run"
    assert train(inputs, folder, "--max_steps", 4, "--keep_last", 1) == 0
    foreign = [*(f"step_00000{step}.pt" for step in (1, 5, 9)), "step_000006.pt.tmp", "latest.pt.tmp", "mine.pt.tmp"]
    for name in foreign:
        (folder / name).write_text(name)
    for path, target in (("step_000002.pt", folder / "step_000004.pt"), ("step_000007.pt", tmp_path / "absent")):
        (folder / path).symlink_to(target)
    assert resume(folder, "latest", "--max_steps", 8, "--override") == 0
    found = files_of(folder)
    assert {data.decode() for data in found.values() if data.endswith((b".pt", b".tmp"))} == set(foreign)
    assert [found[name].decode() for name in ("step_000001.pt", "step_000009.pt", "mine.pt.tmp")] == [
        "step_000001.pt", "step_000009.pt", "mine.pt.tmp"]
    assert (folder / "step_000002.pt").is_symlink() and (folder / "step_000007.abandoned1.pt").is_symlink()
    assert checkpoint.load(folder / "latest.pt")["step"] == 8
    for make in (Path.mkdir, os.mkfifo):
        for name in ("latest.pt", "step_000010.pt", "step_000011.pt.tmp"):
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            before = set(files_of(folder))
            with pytest.raises(UserError, match=rf"/{name}: not a file, so nothing is written there; move it away$"):
                checkpoint.save(folder / name.removesuffix(".tmp"), {})
            assert set(files_of(folder)) == before
            (folder / name).rmdir() if make is Path.mkdir else (folder / name).unlink()


@pytest.mark.parametrize("make, reason", [(Path.mkdir, "not a lock of this program; move it away"),
                                          (os.mkfifo, "not a lock of this program"),
                                          (link("/dev/zero"), "not a lock of this program"),
                                          (link("/proc/self/mem"), "not a lock of this program"),
                                          (lambda path: path.write_bytes(b"\xff" * 999), "not a lock of this program")])
def test_a_lock_that_cannot_be_used_is_named(tmp_path, make, reason):
    make(tmp_path / LOCK)
    with pytest.raises(UserError, match=rf"/{LOCK}: {reason}"):
        train((tmp_path, tmp_path), tmp_path)
    (tmp_path / "disk").symlink_to("absent")
    with pytest.raises(UserError, match="/disk: no folder, or a link to one that is not there; choose another --check"):
        train((tmp_path, tmp_path), tmp_path / "disk")


@pytest.mark.parametrize("module, name, refused, warns", [
    *((fcntl, "flock", refusing(code), True) for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)),
    *((os, "fsync", refusing(code, os.fsync), False) for code in (errno.EINVAL, errno.ENOTSUP)),
    (os, "posix_fadvise", refusing(errno.EINVAL), False), (shutil, "disk_usage", refusing(errno.ENOSYS), False)])
def test_a_file_system_that_lacks_something_ends_no_run(inputs, tmp_path, monkeypatch, capsys, module, name, refused,
                                                        warns):
    monkeypatch.setattr(module, name, refused)
    assert train(inputs, tmp_path, "--max_steps", 1) == 0
    assert capsys.readouterr().out.count(f"{LOCK}: this file system has no locks") == warns
    assert open_data(inputs[0]) and checkpoint.load(tmp_path / "latest.pt")["step"] == 1


def test_a_folder_removed_in_mid_run_is_made_again(tmp_path, run_state):
    for step in (1, 2):
        save_step(tmp_path / "a" / "run", {**run_state, "step": step}, keep_last=1)
        assert load(tmp_path / "a" / "run" / "latest.pt")["step"] == step
        shutil.rmtree(tmp_path / "a")


def test_runs_that_start_in_the_same_second_have_logs_of_their_own(inputs, tmp_path, monkeypatch):
    moments = (datetime(2026, 1, 1, microsecond=number) for number in (1, 2))
    monkeypatch.setattr(setup, "datetime", Mock(now=lambda: next(moments)))
    for name in ("a", "b"):
        assert train(inputs, tmp_path / name, "--max_steps", 1, "--tensorboard_dir", tmp_path / "tb") == 0
    assert len(list((tmp_path / "tb").iterdir())) == 2


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    progress = Progress(options_of("--max_steps", 2), torch.device("cpu"), RunLog(tmp_path / "tb", 0, [], say), 0, None)
    monkeypatch.setattr(progress.log.writer, "add_scalar", Mock(side_effect=OSError(28, "No space left on device")))
    for step in (1, 2):
        progress.evaluation(step, 1.0, [Sample("prompt", "expected", "answer", True)])
    said: list[type] = []
    monkeypatch.setattr(threading, "__excepthook__", lambda failure: said.append(failure.exc_type))
    for error in (OSError(28, "No space left on device"), ValueError("a bug")):  # as TensorBoard's own thread fails
        thread = threading.Thread(target=Mock(side_effect=error))
        thread.start()
        thread.join()
    assert said == [ValueError]
    progress.close()
    out = capsys.readouterr().out
    assert out.count("cannot write the log: No space left on device; the run goes on without it") == 1
    assert "step 2: val loss 1.0000" in out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        RunLog(tmp_path / "file" / "tb", 0, [], say)
