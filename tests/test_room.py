"""What a run says and does about the disk: the warning before it is full, and a log that cannot be written."""

import shutil
import threading
from collections import namedtuple
from unittest.mock import Mock

import pytest

import train_instruct
from errors import UserError
from helpers import options_of, resume_flags, run_inputs
from training.progress import Progress
from weights import checkpoint


@pytest.mark.parametrize("free, warns", [(4 * 10**6, False), (3 * 10**6, True)])
def test_a_run_warns_when_there_is_no_room_for_its_checkpoints(tmp_path, monkeypatch, capsys, free, warns):
    """Three step files and best_model.pt of a model with 362,112 bytes of weights: 3,621,120 bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    flags = [*resume_flags(*run_inputs(tmp_path)), "--max_steps", "1", "--keep_last", "2", "--checkpoint_dir",
             str(tmp_path / "run"), "--tensorboard_dir", str(tmp_path / "tb")]
    assert train_instruct.main(flags) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    told = "3 step files and best_model.pt need 3,621,120 bytes, there is room for 3,000,000"
    assert [told in line for line in warnings] == [True] * warns


def test_what_a_killed_save_left_is_removed(tmp_path):
    for name in ("step_000003.pt.tmp", "latest.pt.tmp", "best_model.pt.tmp", "notes.tmp", "step_000002.pt"):
        (tmp_path / name).write_text("")
    checkpoint.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "step_000002.pt"]


def test_only_tensorboards_own_thread_fails_in_silence(tmp_path, monkeypatch):
    told: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(failure.exc_type))
    hook = threading.excepthook
    progress = Progress(options_of(), tmp_path / "tb", 0, None)
    writer = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary"})
    for kind in (writer, threading.Thread):
        thread = kind(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert told == [ZeroDivisionError]
    progress.close()
    assert threading.excepthook is hook


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    progress = Progress(options_of("--max_steps", 2), tmp_path / "tb", 0, None)
    monkeypatch.setattr(progress.writer, "add_scalar", Mock(side_effect=OSError(28, "No space left on device")))
    for step in (1, 2):
        progress.evaluation(step, 1.0, ["answers"])
    progress.close()
    out = capsys.readouterr().out
    assert out.count("cannot write the log: No space left on device; the run goes on without it") == 1
    assert "step 2: val loss 1.0000" in out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        Progress(options_of(), tmp_path / "file" / "tb", 0, None)
