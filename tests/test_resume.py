"""A run that was stopped and resumed is the run that was not: weights, optimizer, data order, losses, logs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
from cli import CheckpointError, DivergedError, UserError
from conftest import ROOT, SRC
from helpers import (
    SMALL,
    random_examples,
    resume_flags,
    run_ranks,
    same_state,
    small_model,
    trajectory,
    write_data,
    write_pretrained,
)
from train_options import FIXED, FREE, TRAJECTORY, option_table, parse_options
from training_run import train

FINAL = "step_000024.pt"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    data_dir = write_data(folder / "data", {"train": random_examples(60, 64), "val": random_examples(15, 64, seed=1)})
    return data_dir, write_pretrained(folder / "pretrained.pt", small_model())


@pytest.fixture(autouse=True)
def handlers_as_before():
    """The trainer sets signal handlers; other tests want theirs."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def run(inputs: tuple[Path, Path], folder: Path, *flags: object, fresh: bool = True) -> int:
    arguments = resume_flags(*inputs) if fresh else []
    return train(parse_options([*arguments, "--checkpoint_dir", str(folder), "--tensorboard_dir", str(folder / "runs"),
                                *map(str, flags)]))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run that saved every step."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(inputs, folder) == 0
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]}


def test_the_run_spans_epochs_and_accumulates(whole):
    state = checkpoint.load(whole / FINAL)
    assert state["position"][0] >= 2
    assert [step for step, _ in state["val_losses"]] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("step", range(1, 24))
def test_resuming_at_any_step_ends_in_the_same_bits(inputs, whole, tmp_path, step):
    """One process. The logged losses of the resumed part are the same too."""
    assert run(inputs, tmp_path, "--resume", whole / f"step_{step:06d}.pt", fresh=False) == 0
    assert same_state(trajectory(tmp_path / FINAL), trajectory(whole / FINAL))
    name = checkpoint.load(whole / FINAL)["name"]
    resumed, original = scalars(tmp_path / "runs" / name), scalars(whole / "runs" / name)
    for tag in ("train/loss", "learning_rate", "gradient_norm", "epoch"):
        assert resumed[tag] == [entry for entry in original[tag] if entry[0] > step]
    assert dict(original["val/loss"]).items() >= dict(resumed.get("val/loss", [])).items()


def test_a_resume_of_a_resume_of_a_signal(inputs, whole, tmp_path):
    """SIGUSR1 saves and goes on; SIGINT and SIGTERM save and leave with 130 and 143; each time it ends the same."""
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)]:
        folder = tmp_path / str(code)
        process = subprocess.Popen([sys.executable, str(SRC / "train_instruct.py"), *resume_flags(*inputs),
                                    "--checkpoint_freq", "100", "--checkpoint_dir", str(folder), "--tensorboard_dir",
                                    str(folder / "runs")], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(number)
        assert process.wait(60) == code
        assert any(line.startswith(f"saved {folder}/step_0000") for line in lines)
        if code:
            assert run(inputs, folder, "--resume", "latest", "--checkpoint_freq", 3, fresh=False) == 0
        assert same_state(trajectory(folder / "latest.pt"), trajectory(whole / FINAL))


def test_tensorboard_after_three_kills_has_every_step_once(inputs, whole, tmp_path):
    """kill -9 after steps 5, 11 and 17, checkpoints every 2: no gap, no duplicate, the same values."""
    command = [sys.executable, str(SRC / "train_instruct.py"), "--checkpoint_dir", str(tmp_path), "--tensorboard_dir",
               str(tmp_path / "runs")]
    flags = [*resume_flags(*inputs), "--checkpoint_freq", "2"]
    for kill_at in (5, 11, 17, None):
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        for line in process.stdout:
            if kill_at and line.startswith(f"step {kill_at}/"):
                process.kill()
        assert process.wait(60) == (-9 if kill_at else 0)
        flags = ["--resume", "latest"]
    [log] = (tmp_path / "runs").iterdir()
    name = checkpoint.load(whole / FINAL)["name"]
    expected = scalars(whole / "runs" / name)
    for tag, entries in scalars(log).items():
        assert [step for step, _ in entries] == [step for step, _ in expected[tag]], tag
        if tag != "tokens_per_second":
            assert entries == expected[tag]


@pytest.fixture(scope="module")
def two_processes(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(ROOT / "tests" / "resume_worker.py", 2, *inputs, folder, 1, 7, 16, 23)
    return folder


def test_two_processes_resume_to_the_same_bits(two_processes):
    for step in (1, 7, 16, 23):
        assert same_state(trajectory(two_processes / str(step) / FINAL), trajectory(two_processes / "whole" / FINAL))


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits_at_every_step(inputs, tmp_path):
    run_ranks(ROOT / "tests" / "resume_worker.py", 2, *inputs, tmp_path, *range(1, 24), timeout=900)
    for step in range(1, 24):
        assert same_state(trajectory(tmp_path / str(step) / FINAL), trajectory(tmp_path / "whole" / FINAL))


def test_the_number_of_processes_may_change(inputs, whole, two_processes, tmp_path):
    """From two processes to one and to four: the same examples in the same order, the same losses."""
    source = two_processes / "whole" / "step_000010.pt"
    assert run(inputs, tmp_path / "one", "--resume", source, fresh=False) == 0
    (tmp_path / "four" / "whole").mkdir(parents=True)
    shutil.copy(source, tmp_path / "four" / "whole" / source.name)
    run_ranks(SRC / "train_instruct.py", 4, "--resume", source, "--checkpoint_dir", tmp_path / "four",
              "--tensorboard_dir", tmp_path / "four")
    expected = checkpoint.load(whole / FINAL)
    for folder in (tmp_path / "one", tmp_path / "four", two_processes / "whole"):
        state = checkpoint.load(folder / FINAL)
        assert state["position"] == expected["position"]
        assert [loss for _, loss in state["val_losses"]] == pytest.approx(
            [loss for _, loss in expected["val_losses"]], rel=1e-5)


def test_every_option_says_what_a_resume_may_do_with_it():
    table = option_table()
    names = {action.dest for action in table.parser._actions} - {"help", "resume", "override"}
    assert set(table.on_resume) == names
    assert set(table.on_resume.values()) == {FIXED, TRAJECTORY, FREE}


@pytest.mark.parametrize("flag, value", [("--learning_rate", 5e-4), ("--total_batch_size", 512), ("--seed", 1),
                                         ("--max_steps", 30), ("--warmup_steps", 5), ("--grad_clip", 2.0)])
def test_a_change_of_trajectory_needs_override(inputs, whole, tmp_path, flag, value):
    source = whole / "step_000023.pt"
    with pytest.raises(UserError, match=rf"{flag} was .*, now {value}; add --override"):
        run(inputs, tmp_path, "--resume", source, flag, value, fresh=False)
    assert run(inputs, tmp_path, "--resume", source, flag, value, "--override", fresh=False) == 0


def test_architecture_and_data_cannot_change(inputs, whole, tmp_path):
    source = whole / "step_000023.pt"
    for flag, value in [("--context_length", 32), ("--from_scratch", "2,2,32")]:
        with pytest.raises(UserError, match=rf"cannot change: {flag} was .*, now {value}"):
            run(inputs, tmp_path, "--resume", source, flag, value, "--override", fresh=False)
    examples = random_examples(60, 64)
    tokens, prompt = examples[7]
    changed_token = [*examples[:7], ([*tokens[:-1], tokens[-1] ^ 1], prompt), *examples[8:]]
    val_examples = random_examples(15, 64, seed=1)
    for number, train_examples in enumerate([changed_token, examples[::-1], examples[:-1]]):
        other = write_data(tmp_path / f"data{number}", {"train": train_examples, "val": val_examples})
        with pytest.raises(UserError, match="not the data this run was started with"):
            run(inputs, tmp_path, "--resume", source, "--data_dir", other, "--override", fresh=False)


def test_free_options_may_change_and_others_are_kept(inputs, whole, tmp_path):
    assert run(inputs, tmp_path, "--resume", whole / "step_000020.pt", "--mini_batch_size", 8, "--eval_freq", 3,
               fresh=False) == 0
    state = checkpoint.load(tmp_path / FINAL)
    assert (state["options"]["mini_batch_size"], state["options"]["learning_rate"]) == (8, 1e-3)
    assert [step for step, _ in state["val_losses"]] == [4, 8, 12, 16, 20, 21, 24]


def test_wrong_starts_say_what_to_do(inputs, whole, tmp_path):
    """Exit 2, or 3 for a file that is no state of a run; a run is never overwritten."""
    cases = [
        ((*resume_flags(*inputs),), "a run is here already; --resume latest", whole, UserError),
        (("--resume", tmp_path / "absent.pt"), "no such file", tmp_path, UserError),
        (("--resume", "latest"), "no checkpoint to resume from", tmp_path / "empty", UserError),
        (("--resume", whole / "best_model.pt"), "weights only", tmp_path, UserError),
        (("--resume", inputs[1]), "weights only", tmp_path, UserError),
        ((*resume_flags(inputs[0], tmp_path / "absent.pt"),), "no pre-trained model", tmp_path, UserError),
        ((*resume_flags(tmp_path / "absent", inputs[1]),), "no prepared data there", tmp_path, UserError),
        ((*resume_flags(*inputs), "--total_batch_size", 63), "counts tokens, not examples", tmp_path, UserError),
        ((*resume_flags(*inputs), "--context_length", 2048), "above the model's 1024", tmp_path, UserError),
        ((*resume_flags(*inputs), "--min_lr", 1), "--min_lr 1.0 is above --learning_rate", tmp_path, UserError),
        ((*resume_flags(*inputs), "--from_scratch", "2,3,32"), "not a multiple of n_head 3", tmp_path, UserError),
        ((*resume_flags(*inputs), "--from_scratch", "2,3"), "takes layers,heads,width", tmp_path, UserError),
    ]
    before = (whole / "latest.pt").read_bytes()
    for flags, message, folder, kind in cases:
        with pytest.raises(kind, match=message):
            run(inputs, folder, *flags, fresh=False)
    assert (whole / "latest.pt").read_bytes() == before
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(before[:1000] + b"?" + before[1001:])
    with pytest.raises(CheckpointError, match="damaged.pt"):
        run(inputs, tmp_path, "--resume", damaged, fresh=False)


def test_two_runs_do_not_share_a_folder(inputs, tmp_path):
    """The second exits 2 naming the holder, at once; once the holder is dead the folder is free."""
    process = subprocess.Popen([sys.executable, str(SRC / "train_instruct.py"), *resume_flags(*inputs), "--max_steps",
                                "100000", "--checkpoint_dir", str(tmp_path), "--tensorboard_dir", str(tmp_path / "r")],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"another run is writing there .process {process.pid} on "):
        run(inputs, tmp_path, "--resume", "latest", fresh=False)
    assert time.monotonic() - begin < 5
    process.kill()
    process.communicate()
    assert run(inputs, tmp_path, "--resume", "latest", "--max_steps", 24, "--override", fresh=False) == 0


@pytest.mark.parametrize("bad_steps, ends", [((3,), False), ((3, 4, 6, 7), False), ((5, 6, 7), True)])
def test_what_is_not_finite_never_reaches_the_weights(inputs, tmp_path, monkeypatch, capsys, bad_steps, ends):
    """A NaN in the loss of one micro-batch: the step is skipped and reported, three in a row end with exit 4."""
    import train_step

    real, calls = train_step.F.linear_cross_entropy, {"step": 0}

    def poisoned(*arguments, **keywords):
        loss = real(*arguments, **keywords)
        return loss * float("nan") if calls["step"] in bad_steps else loss

    def counted(optimizer, real=train_step.torch.optim.AdamW.zero_grad, **keywords):
        calls["step"] += 1
        return real(optimizer, **keywords)

    monkeypatch.setattr(train_step.F, "linear_cross_entropy", poisoned)
    monkeypatch.setattr(train_step.torch.optim.AdamW, "zero_grad", counted)
    if ends:
        with pytest.raises(DivergedError, match=r"3 steps in a row, up to step 7; the last good checkpoint is .*step_"):
            run(inputs, tmp_path, "--max_steps", 9)
    else:
        assert run(inputs, tmp_path, "--max_steps", 9) == 0
    out = capsys.readouterr().out
    assert [f"step {step} skipped: loss nan" in out for step in range(1, 10)] == [s in bad_steps for s in range(1, 10)]
    assert "train examples [" in out
    for path in tmp_path.glob("*.pt"):
        state = checkpoint.load(path)
        assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


def test_random_weights_and_small_models_train(inputs, tmp_path):
    assert run(inputs, tmp_path, *resume_flags(*inputs), "--from_scratch", "1,1,8", "--max_steps", 2, fresh=False) == 0
    assert checkpoint.load(tmp_path / "latest.pt")["model_config"]["n_embd"] == 8
    assert SMALL.n_embd == 32 and os.path.exists(tmp_path / "best_model.pt")


@pytest.mark.parametrize("back", [True, False])
def test_latest_is_the_file_that_a_run_was_resumed_from(inputs, whole, tmp_path, monkeypatch, back):
    """So a restart of the processes, before anything new is saved, does not go on from a later one."""
    folder = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("training_run._loop", lambda run: 0)
    path = checkpoint.step_files(folder)[-1 if back else 0]
    (folder / "latest.pt").unlink()  # shutil copies a hard link as a file of its own
    os.link(checkpoint.step_files(folder)[0], folder / "latest.pt")
    assert run(inputs, folder, "--resume", path, fresh=False) == 0
    assert (folder / "latest.pt").samefile(path)
    assert not list(folder.glob("*.tmp"))


def test_a_run_that_cannot_start_leaves_latest_as_it_was(inputs, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = checkpoint.load(folder / "latest.pt")["step"]
    oldest = checkpoint.step_files(folder)[-1]
    (tmp_path / "a file").write_text("")
    flags = ["--resume", oldest, "--tensorboard_dir", tmp_path / "a file"]
    with pytest.raises(UserError, match="a file"):
        run(inputs, folder, *flags, fresh=False)
    assert checkpoint.load(folder / "latest.pt")["step"] == before > checkpoint.load(oldest)["step"]


def test_a_context_length_of_0_is_no_change_on_resume(inputs, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert run(inputs, folder, "--resume", "latest", "--context_length", 0, fresh=False) == 0


def test_a_reader_who_leaves_ends_no_run(inputs, tmp_path):
    """stdout is a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    flags = [*resume_flags(*inputs), "--max_steps", "3", "--checkpoint_dir", tmp_path, "--tensorboard_dir", tmp_path]
    done = subprocess.run([sys.executable, SRC / "train_instruct.py", *map(str, flags)], stdout=writer,
                          stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 3
