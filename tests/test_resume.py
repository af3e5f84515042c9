"""A run that was stopped and resumed is the run that was not: weights, optimizer, data order, losses, logs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_instruct
from conftest import SRC
from errors import CheckpointError, DivergedError, UserError
from helpers import open_data, random_examples, resume, resume_flags, run_ranks, to, train, trajectory, write_data
from models import learner_of, same_state
from training import launch, loop
from training import step as training_step
from training.ending import Signals
from training.options import FIXED, FREE, ON_RESUME, TRAJECTORY, parse_options
from training.setup import open_run
from weights import checkpoint
from weights.durable import LOCK

FINAL = "step_000024.pt"
VARYING = {"train/tokens_per_second", "train/data_wait", "train/memory_gb"}  # from run to run
TRAINER = SRC / "train_instruct.py"


def start(folder: Path, *flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(TRAINER), *to(folder, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run over several epochs that saved every step."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(inputs, folder) == 0
    state = checkpoint.load(folder / FINAL)
    assert state["position"][0] >= 2 and [step for step, _ in state["val_losses"]] == [0, 4, 8, 12, 16, 20, 24]
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]}


@pytest.mark.parametrize("step", range(1, 24))
def test_resuming_at_any_step_ends_in_the_same_bits(inputs, whole, tmp_path, step):
    """One process. The logged losses of the resumed part are the same too."""
    assert resume(tmp_path, whole / f"step_{step:06d}.pt") == 0
    assert same_state(trajectory(tmp_path / FINAL), trajectory(whole / FINAL))
    resumed, original = (scalars(folder / "runs" / checkpoint.load(folder / FINAL)["name"])
                         for folder in (tmp_path, whole))
    for tag in ("train/loss", "train/learning_rate", "train/gradient_norm", "train/epoch"):
        assert resumed[tag] == [entry for entry in original[tag] if entry[0] > step]
    assert dict(original["val/loss"]).items() >= dict(resumed.get("val/loss", [])).items()


def test_a_resume_of_a_resume_of_a_signal(inputs, whole, tmp_path):
    """SIGINT and SIGTERM save and leave with 130 and 143; resumed, the run ends the same."""
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143)]:
        folder = tmp_path / str(code)
        process = start(folder, *resume_flags(*inputs), "--checkpoint_freq", 100)
        saved = False
        for line in process.stdout:
            saved |= line.startswith(f"saved {folder}/step_0000")
            if line.startswith("step 3/"):
                process.send_signal(number)
        assert process.wait(60) == code and saved
        assert resume(folder, "latest", "--checkpoint_freq", 3) == 0
        assert same_state(trajectory(folder / "latest.pt"), trajectory(whole / FINAL))


def test_tensorboard_after_three_kills_has_every_step_once(inputs, whole, tmp_path):
    """kill -9 after steps 5, 11 and 17, checkpoints every 2: no gap, no duplicate, the same values; metrics.jsonl too,
    in which a kill left half a line."""
    flags = [*resume_flags(*inputs), "--checkpoint_freq", "2"]
    for kill_at in (5, 11, 17, None):
        process = start(tmp_path, *flags)
        for line in process.stdout:
            if kill_at and line.startswith(f"step {kill_at}/"):
                process.kill()
        assert process.wait(60) == (-9 if kill_at else 0)
        flags = ["--resume", "latest"]
        [log] = (tmp_path / "runs").iterdir()
        if kill_at:
            with (log / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1, "train/lo')
    expected = scalars(whole / "runs" / checkpoint.load(whole / FINAL)["name"])
    found = scalars(log)
    metrics = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    for tag in found:
        entries = [(line["step"], line[tag]) for line in metrics if tag in line]
        assert entries == [(step, pytest.approx(value, rel=1e-6)) for step, value in found[tag]], tag
    for tag, entries in found.items():
        assert [step for step, _ in entries] == [step for step, _ in expected[tag]], tag
        assert entries == expected[tag] or tag in VARYING


@pytest.fixture(scope="module")
def two_processes(inputs, tmp_path_factory) -> Path:
    """As whole, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(TRAINER, 2, *resume_flags(*inputs), *to(folder))
    return folder


@pytest.mark.parametrize("steps", [(1, 16), pytest.param(range(1, 24), marks=pytest.mark.slow)], ids=len)
def test_two_processes_resume_to_the_same_bits(two_processes, tmp_path, steps):
    for step in steps:
        source = two_processes / f"step_{step:06d}.pt"
        run_ranks(TRAINER, 2, *to(tmp_path / str(step), "--resume", source, "--keep_last", 1))
        assert same_state(trajectory(tmp_path / str(step) / FINAL), trajectory(two_processes / FINAL))


def test_the_number_of_processes_may_change(whole, two_processes, tmp_path):
    """From two processes to one and to four: the same examples in the same order, the same losses."""
    source = two_processes / "step_000010.pt"
    assert resume(tmp_path / "one", source) == 0
    run_ranks(TRAINER, 4, *to(tmp_path / "four", "--resume", source))
    expected = checkpoint.load(whole / FINAL)
    for folder in (tmp_path / "one", tmp_path / "four", two_processes):
        state = checkpoint.load(folder / FINAL)
        assert state["position"] == expected["position"]
        losses = [[loss for _, loss in each["val_losses"]] for each in (state, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_option_says_what_a_resume_may_do_with_it():
    assert set(ON_RESUME) == set(vars(parse_options([]))) - {"resume", "override", "device", "epochs", "dry_run"}
    assert set(ON_RESUME.values()) == {FIXED, TRAJECTORY, FREE}


@pytest.mark.parametrize("flag, value", [("--learning_rate", 5e-4), ("--total_batch_size", 512), ("--seed", 1),
                                         ("--max_steps", 30), ("--warmup_steps", 5), ("--grad_clip", 2.0)])
def test_a_change_of_trajectory_needs_override(inputs, whole, tmp_path, flag, value):
    source = whole / "step_000023.pt"
    with pytest.raises(UserError, match=rf"{flag} was .*, now {value}; add --override"):
        resume(tmp_path, source, flag, value)
    assert resume(tmp_path, source, flag, value, "--override") == 0


def test_a_checkpoint_names_no_folder_outside_the_current_one(inputs, whole, tmp_path, monkeypatch):
    """A file from elsewhere could name any. What the command line names is taken."""
    shutil.copy(whole / "step_000023.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--resume", "step_000023.pt", "--checkpoint_dir", str(tmp_path)]
    named = f"--data_dir {inputs[0]} --tensorboard_dir {whole}/runs"
    with pytest.raises(UserError, match=f"outside this one.* add: {named}$"):
        train_instruct.main(flags)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step_000023.pt"}
    assert train_instruct.main([*flags, "--data_dir", str(inputs[0]), "--tensorboard_dir", "logs"]) == 0
    Path("data_instruct").symlink_to(inputs[0])  # what every start names is nothing that a file has chosen
    flags = ["--from_scratch=1,1,8", "--context_length=64", "--max_steps=1", "--device=cpu", "--resume=auto"]
    assert [train_instruct.main(flags) for _ in range(2)] == [0, 0]


def test_architecture_and_data_cannot_change(inputs, whole, tmp_path):
    source = whole / "step_000023.pt"
    for flag, value in [("--context_length", 32), ("--from_scratch", "2,2,32")]:
        with pytest.raises(UserError, match=rf"cannot change: {flag} was .*, now {value}"):
            resume(tmp_path, source, flag, value, "--override")
    examples, changed_token = random_examples(60, 64), random_examples(60, 64)
    changed_token[7][0][-1] ^= 1
    for number, train_examples in enumerate([changed_token, examples[::-1], examples[:-1]]):
        splits = {"train": train_examples, "val": random_examples(15, 64, seed=1)}
        other = write_data(tmp_path / f"data{number}", splits)
        with pytest.raises(UserError, match="not the data this run was started with"):
            resume(tmp_path, source, "--data_dir", other, "--override")


def test_free_options_may_change_and_others_are_kept(inputs, whole, tmp_path):
    folder, [log] = shutil.copytree(whole, tmp_path / "run"), whole.glob("runs/*/metrics.jsonl")
    before, runs = log.read_bytes(), ("--tensorboard_dir", whole / "runs")
    assert resume(folder, "latest", "--max_steps", 25, "--override", *runs) == 0
    assert log.read_bytes() == before  # of the run that was copied
    assert resume(folder, "latest", "--context_length", 0) == 0  # the model's own, which the run has: no change
    log = folder / "runs" / checkpoint.load(whole / FINAL)["name"] / "metrics.jsonl"
    before = log.read_bytes()
    branch = "--tensorboard_dir", folder / "runs"  # in another folder, so the run there keeps its log
    assert resume(tmp_path, folder / "step_000020.pt", "--mini_batch_size", 8, "--eval_freq", 3, *branch) == 0
    assert log.read_bytes() == before
    # below the run's learning rate, above the default one
    assert resume(tmp_path / "rate", folder / "step_000023.pt", "--min_lr", 1e-4, "--override") == 0
    state = checkpoint.load(tmp_path / FINAL)
    assert (state["options"]["mini_batch_size"], state["options"]["learning_rate"]) == (8, 1e-3)
    assert [step for step, _ in state["val_losses"]] == [0, 4, 8, 12, 16, 20, 21, 24]


def test_wrong_starts_say_what_to_do(inputs, whole, tmp_path):
    """Exit 2, or 3 for a file that is no state of a run; a run is never overwritten."""
    cases = [
        ((), "a run is here already; --resume latest", whole),
        (("--resume", "latest"), "no checkpoint to resume from .*with auto, a run starts$", tmp_path / "empty"),
        (("--resume", "latest"), "no checkpoint to resume .* starts, in another --checkpoint_dir$", tmp_path / "best"),
        (("--resume", whole / "best_model.pt"), "weights only", tmp_path),
        (("--resume", inputs[1]), "weights only", tmp_path),
        (("--context_length", 2048), "above the model's 1024", tmp_path),
        (("--resume", whole / FINAL, "--max_steps", 22, "--override"), "nothing to do: .* is at step 24", whole),
        (("--resume", whole / "step_000023.pt"), "a run is here already", tmp_path / "other"),
        ((), "step_000007.pt: a run is here already; --resume latest", tmp_path / "foreign"),
        ((), "best_model.pt: a run is here already; another --checkpoint_dir", tmp_path / "best"),
        (("--resume", "lastest"), "lastest: no such file to resume from", tmp_path),
        (("--min_lr", 1), "--min_lr 1.0 is above --learning_rate", tmp_path),
        (("--resume", whole), "a folder; to go on from its newest checkpoint: --resume latest --checkpoint_", tmp_path),
        (("--tensorboard_dir", "n\udcff"), "expected a path in UTF-8", tmp_path),
        (("--from_scratch", "2,3,32"), "--from_scratch 2,3,32: n_embd 32 is not a multiple of n_head 3", tmp_path),
        (("--from_scratch", "999999999,1,8"), "999999999,1,8: more than a hundred billion parameters", tmp_path),
        (("--from_scratch=1,1,8",), "--from_scratch: not allowed with argument --pretrained_model", tmp_path),
        (("--from_scratch", "2,3"), "expected layers,heads,width such as 4,4,128, not '2,3'", tmp_path),
    ]
    for name in ("other/latest.pt", "foreign/step_000007.pt", "best/best_model.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("somebody's")
    before = (whole / "latest.pt").read_bytes()
    with pytest.raises(UserError, match="lastest: no such file"):
        train(inputs, tmp_path / "best", "--resume", "lastest")
    assert not (tmp_path / "best" / LOCK).exists()
    for flags, message, folder in cases:
        with pytest.raises(UserError, match=message):
            train(inputs, folder, *flags)
    assert not (tmp_path / "empty").exists()
    assert (whole / "latest.pt").read_bytes() == before
    assert {path.read_text() for path in tmp_path.glob("*/*.pt")} == {"somebody's"}
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(before[:1000] + b"?" + before[1001:])
    with pytest.raises(CheckpointError, match="damaged.pt"):
        resume(tmp_path, damaged)


@pytest.mark.parametrize("flags, is_restart", [(("--resume", "auto"), False), ((), True)])
def test_a_restart_and_auto_go_on_where_a_run_is_and_begin_where_none_is(inputs, tmp_path, monkeypatch, capsys, flags,
                                                                         is_restart):
    """The launcher's word for a restart is a file that is there."""
    monkeypatch.setenv("INSTRUCT_BEGUN", str(tmp_path) if is_restart else "")
    for is_there in (False, True):
        assert train(inputs, tmp_path, "--max_steps", 2, *flags) == 0
        assert ("resumed from" in capsys.readouterr().out) == is_there


@pytest.mark.parametrize("main, processes", [(train_instruct.main, []), (launch.main, ["2"])])
def test_two_runs_do_not_share_a_folder(inputs, tmp_path, monkeypatch, main, processes):
    """The second is refused naming the holder, by the launcher before it starts a process."""
    monkeypatch.setattr(sys, "argv", ["", *processes, *to(tmp_path, "--resume", "latest")])
    monkeypatch.setattr(launch, "block_signals", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    holder = f"another run is writing there .process {os.getpid()} on "
    with open_run([*resume_flags(*inputs), *to(tmp_path)]), pytest.raises(UserError, match=holder):
        main()


def test_a_val_loss_that_is_no_number_ends_a_run_that_was_not_skipped(inputs, tmp_path):
    with pytest.raises(DivergedError, match="^the val loss is nan, up to step 1; there is no checkpoint yet"):
        train(inputs, tmp_path, "--learning_rate", 1e30, "--warmup_steps", 0, "--eval_freq", 1)
    assert not checkpoint.step_files(tmp_path)


def test_the_first_evaluation_saves_once_and_best_model_is_never_alone(inputs, whole, tmp_path, capsys):
    """It saves though no checkpoint is due; a kill between that and best_model.pt is made good by the resume."""
    assert train(inputs, tmp_path, "--checkpoint_freq", 100, "--max_steps", 8, "--eval_examples", 3) == 0
    out = capsys.readouterr().out
    assert [line.rsplit("/")[-1] for line in out.splitlines() if line.startswith("saved ")] == [
        "step_000004.pt", "step_000008.pt"]
    state = checkpoint.load(tmp_path / "step_000004.pt")
    val = open_data(inputs[0], 64)["val"]
    loss = training_step.evaluate(learner_of(checkpoint.model_of(state, tmp_path)), val,
                                  val.plan(range(3), 512, 1))
    assert state["val_losses"][1:] == [[4, pytest.approx(loss)]]
    best, folder = trajectory(whole / "best_model.pt"), shutil.copytree(whole, tmp_path / "killed")
    source = folder / f"step_{best['step']:06d}.pt"
    for damage in (Path.unlink, lambda path: path.write_bytes(b"")):
        damage(folder / "best_model.pt")
        with open_run(to(folder, "--resume", source)) as opened:
            assert not opened.has_best
    assert resume(folder, source) == 0
    assert same_state(trajectory(folder / "best_model.pt"), best)


def test_an_evaluation_that_was_cut_short_is_made_up_for_once(inputs, tmp_path, monkeypatch):
    """Even if the process dies right after it, before it is saved."""
    signals: list[Signals] = []
    monkeypatch.setattr(Signals, "watch", lambda signals_of_run: signals.append(signals_of_run))
    flags = ["--max_steps", 4, "--eval_freq", 4, "--checkpoint_freq", 100]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda learner, *more, **how: (
            training_step.evaluate(learner, *more, **how) if not learner.optimizer.state else
            signals[-1].note(signal.SIGINT) or None))
        assert train(inputs, tmp_path, *flags) == 130
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "save_step", Mock(side_effect=RuntimeError("killed")))
        resume(tmp_path, "latest")
    assert resume(tmp_path, "latest") == 0
    assert [step for step, _ in checkpoint.load(tmp_path / "latest.pt")["val_losses"]] == [0, 4]
    [metrics] = tmp_path.glob("runs/*/metrics.jsonl")
    assert [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "val/loss" in line] == [0, 4]


def test_a_run_that_goes_back_leaves_the_other_branch_and_keeps_the_best_of_both(inputs, whole, tmp_path, capsys):
    """Whatever of the new branch is lost. Nothing is removed; the other branch's files get other names, and others when
    the run goes back once more. latest.pt is what a run was resumed from, if it could start."""
    folder = shutil.copytree(whole, tmp_path / "run")
    best, newest = checkpoint.load(folder / "best_model.pt"), (folder / FINAL).read_bytes()
    checkpoint.save(folder / "best_model.pt", {**best, "val_losses": [[4, 9.0], [20, 0.01]]})  # beyond step 7
    best = (folder / "best_model.pt").read_bytes()
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="a file"):
        resume(folder, folder / "step_000001.pt", "--tensorboard_dir", tmp_path / "a file")
    assert checkpoint.load(folder / "latest.pt")["step"] == 24
    for again in (1, 2):
        assert resume(folder, folder / "step_000007.pt", "--max_steps", 9, "--learning_rate", 1e-9, "--min_lr", 0,
                      "--override") == 0
        told = capsys.readouterr().out
        assert "step_000009.pt is not what led to step_000007.pt at step 7; it is now step_000009.abandoned" in told
        assert [checkpoint.step_of(path) for path in checkpoint.step_files(folder)] == list(range(9, 0, -1))
        assert (folder / f"step_000009.abandoned{again}.pt").exists()
    assert (folder / "step_000024.abandoned1.pt").read_bytes() == newest
    assert (folder / "best_model.pt").read_bytes() == best
    for lost in ("latest.pt", "step_000009.pt", "step_000008.pt"):
        os.truncate(folder / lost, 1000)
    assert checkpoint.newest_valid(folder, print)[0].name == "step_000007.pt"
    (folder / "link.pt").symlink_to("step_000008.abandoned1.pt")  # what it names is meant
    source = folder / "link.pt"
    for _ in range(2):  # and forward again, then from the file that latest.pt is already
        with open_run(to(folder, "--resume", source)):
            assert checkpoint.step_files(folder) == [] and (folder / "latest.pt").samefile(source)
            assert not (folder / "latest.pt").is_symlink()
    assert not list(folder.glob("*.tmp"))


def test_a_reader_who_leaves_ends_no_run(inputs, tmp_path):
    """stdout is a pipe that nobody reads any more."""
    process = start(tmp_path, *resume_flags(*inputs), "--max_steps", 3)
    process.stdout.close()
    assert process.wait(120) == 0
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 3
