"""What a run says before, during and after: epochs, dry run, terminal, patience, summary; loss_on."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_instruct
from conftest import ROOT, SRC, launch
from data.shards import open_prepared
from dataloader_instruct import ExampleStream, InstructData
from errors import UserError
from helpers import open_data, random_examples, resume, resume_flags, to, train, write_data
from model import GPTConfig
from models import learner_of, options_of, small_model
from training.checks import doubt_about_weights, doubts
from training.step import train_step
from weights import checkpoint


def test_epochs_become_the_steps_of_the_run(inputs, tmp_path, capsys):
    """The checkpoint knows max_steps only; what would change it on resume needs --override."""
    assert train(inputs, tmp_path, "--epochs", 1) == 0
    steps = checkpoint.load(tmp_path / "latest.pt")["step"]
    assert f"{steps} steps = 1." in capsys.readouterr().out and steps > 2
    assert resume(tmp_path, "latest", "--epochs", 1) == 0
    with pytest.raises(UserError, match=rf"--epochs 2 is \d+ steps, the run's --max_steps is {steps}: .* --override"):
        resume(tmp_path, "latest", "--epochs", 2)
    assert resume(tmp_path, "latest", "--epochs", 2, "--override") == 0
    assert checkpoint.load(tmp_path / "latest.pt")["step"] > steps


@pytest.mark.parametrize("flags, name, said", [
    (["--max_steps", 2000], "run", r"\d+ times through .*: --epochs 3 --total_batch_size 128 --warmup_steps \d+ \(\d+"),
    (["--max_steps", 2000, "--from_scratch", "1,1,8"], "run", None),  # random weights need more
    (["--max_steps", 10, "--warmup_steps", 10], "run", "still be rising at the end .* --warmup_steps 1"),
    (["--max_steps", 10, "--warmup_steps", 1], "run", None),
    (["--max_steps", 9, "--warmup_steps", 1, "--context_length", 30], "data", r"\d\d % .* a larger --context_length"),
])
def test_what_is_doubtful_is_said_with_what_to_do(inputs, tmp_path, monkeypatch, flags, name, said):
    options = options_of("--total_batch_size", 1024, "--context_length", 64, "--checkpoint_dir", tmp_path, *flags)
    data = open_data(inputs[0], options.context_length)
    stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
    found = doubts(options, small_model(), data, stream, ["cpu"])
    assert set(found) == ({name} if said else set()) and (not said or re.search(said, found[name]))
    if name == "data":
        shorter = small_model(config=GPTConfig(options.context_length, 64, 1, 1, 16))
        assert "the model can take no longer ones" in doubts(options, shorter, data, stream, ["cpu"])[name]
    for memory, more in ((10**6, {"saves"}), (10**9, set())):  # a copy takes 12 bytes a parameter
        monkeypatch.setattr("training.checks.computer_memory", lambda memory=memory: memory)
        assert doubts(options, small_model(), data, stream, ["cpu"]) == found
        assert doubts(options, small_model(), data, stream, ["T4, 16 GB"]).keys() == found.keys() | more


def tree(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("flags, code, said", [
    ([], 0, [r"ok       device +cpu, 1 process", r"ok       fingerprint +[0-9a-f]{12}, of made by a test",
             r"ok       run +24 steps = ", "ok       disk ", r"ok       first loss +6\.9",
             r"ok       memory +about 0\.", r"ok       time +about \d",
             "the run can start, warnings: 0; this was a dry run"]),
    (["--max_steps", 2000], 0, ["warning  run +.* --epochs 3", "the run can start, warnings: 1;"]),
    (["--data_dir", "absent", "--pretrained_model", "absent.pt"], 2, [
        "failure  data +absent/dataset_info.json: no prepared data there; name the folder", "warning  the rest",
        "failure  model +absent.pt: no pre-trained model; put ", r"2 of \d checks failed"]),
    (["--total_batch_size", 63], 2, ["failure  step +.*counts tokens, not examples", "1 of "]),
    (["--compile"], 0, ["warning  compile +--compile does not work here, going on without: "]),
    (["--resume", "auto", "--pretrained_model", "absent.pt"], 2, ["failure  model +absent.pt: no pre-trained model"]),
    (["--resume", "absent.pt", "--data_dir", "absent"], 2, ["failure  start +absent.pt: no such file", "1 of "]),
    (["--device", "mps"], 2, ["failure  device +--device mps: no such device here"]),
    (["--checkpoint_dir", "pretrained.pt/below"], 2, ["failure  folders +.*cannot write there: Not a directory"]),
])
def test_a_dry_run_says_all_and_leaves_nothing(inputs, tmp_path, monkeypatch, capsys, flags, code, said):
    monkeypatch.chdir(inputs[0].parent)
    before = tree(inputs[0].parent)
    usual = [*resume_flags(*inputs), "--checkpoint_dir", "new/run", "--tensorboard_dir", "logs"]
    assert train_instruct.main([*usual, "--dry_run", *map(str, flags)]) == code
    out = capsys.readouterr().out
    assert all(re.search(line, out) for line in said), out
    assert tree(inputs[0].parent) == before


def test_a_dry_run_of_two_processes_on_a_run_that_is_there(inputs, tmp_path):
    assert train(inputs, tmp_path, "--max_steps", 1) == 0
    before = [path for path, _ in tree(tmp_path)]
    for flags, code, said in ((resume_flags(*inputs), 2, ["failure  start .* a run is here already"]),
                              (["--resume", "latest", "--data_dir", inputs[0]], 0, ["cpu, 2 processes",
                                                           f"goes on from {tmp_path}/latest.pt at step 1"])):
        found = launch(ROOT, "start_instruct_training.sh", 2, *flags, *to(tmp_path, "--dry_run"))
        assert found.code == code and all(re.search(line, found.stdout) for line in said)
    assert [path for path, _ in tree(tmp_path)] == before


@pytest.mark.parametrize("shared_by", ["processes", "containers"])
def test_processes_on_a_cpu_share_its_memory(inputs, tmp_path, monkeypatch, capsys, shared_by):
    if shared_by == "processes":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    else:
        read = Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda path, *how: "1000000\n" if path.name == "memory.max" else
                            read(path, *how))
    assert train(inputs, tmp_path, "--dry_run") == 0
    assert re.search(r"warning  memory .* are there: --mini_batch_size", capsys.readouterr().out)


def test_a_dry_run_finds_a_state_that_cannot_be_put_back(tmp_path, run_state, capsys):
    checkpoint.save(tmp_path / "a.pt", {**run_state, "position": [0, 999]})
    flags = to(tmp_path / "b", "--resume", tmp_path / "a.pt", "--max_steps", 9, "--override", "--device", "cpu")
    assert train_instruct.main([*flags, "--dry_run"]) == 2 and not (tmp_path / "b").exists()
    assert re.search(r"failure  start .*: not a complete state of a run: position 999 of 3", capsys.readouterr().out)


def test_weights_of_no_language_model_are_told_by_their_first_loss():
    assert doubt_about_weights(3.2) == "" and "tokenizer is not GPT-2's" in doubt_about_weights(10.9)


def test_steps_are_lines_where_stdout_is_no_terminal(inputs, tmp_path, monkeypatch, capsys):
    """As beside tee, where stderr is one."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert train(inputs, tmp_path, "--max_steps", 2) == 0
    out, err = capsys.readouterr()
    assert "\nstep 2/2 loss " in out and err == ""


@pytest.mark.parametrize("flags, said", [([], "the 23 that are left take 6:23:20"),
                                         (["--compile"], "the 13 that are left take 0:00:13")])
def test_the_time_that_is_left_is_said_once(inputs, tmp_path, monkeypatch, capsys, flags, said):
    """The first step takes 1,000 s, all others one. If it compiles, it says nothing of those."""
    clock = chain([0, 0, 1000], chain.from_iterable((second, second + 1) for second in count(1000)))
    monkeypatch.setattr("training.loop.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert train(inputs, tmp_path, "--max_steps", 24, *flags) == 0
    assert re.findall("at the pace of the first steps, (.*)", capsys.readouterr().out) == [said]


@pytest.mark.parametrize("trap, code, steps", [("", 129, 10**6), ("trap '' HUP; ", 0, 300)])
def test_a_terminal_that_is_closed_ends_no_run_that_was_not_saved(inputs, tmp_path, trap, code, steps):
    """It had the bar. With SIGHUP ignored the run goes on to its end."""
    flags = [*resume_flags(*inputs), *to(tmp_path), *chain.from_iterable(
        (name, steps) for name in ("--max_steps", "--eval_freq", "--checkpoint_freq"))]
    command = shlex.join(map(str, (sys.executable, SRC / "train_instruct.py", *flags)))
    pid, master = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", f"{trap}exec {command}"])
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while not re.search(rb"\d tok/s", shown):  # a step is done
        shown += os.read(master, 4096)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert 0 < checkpoint.load(tmp_path / "latest.pt")["step"] <= steps


@pytest.mark.parametrize("columns", [80, 40])
def test_nothing_is_cut_on_a_terminal(inputs, tmp_path, columns):
    """Of the bar; the words beside it are those that fit. The last state of the bar has the last val loss."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, SRC / "train_instruct.py", *resume_flags(*inputs), *to(tmp_path)]
    command += ["--max_steps", 12, "--warmup_steps", 20]
    process = subprocess.Popen(list(map(str, command)), stdout=slave, stderr=slave, cwd=tmp_path)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0
    bars = [bar for bar in re.split(r"[\r\n]|\x1b\[A", shown.decode()) if re.match(r"\d+/12 ", bar)]
    words = r", val \d+\.\d{4}, [\d,]+ tok/s" if columns == 80 else ""
    assert all(len(bar) <= columns for bar in bars)
    assert re.fullmatch(r"12/12 \S+ 00:00 left, loss \d\.\d{4}" + words, bars[-1].rstrip()), bars[-1]
    last = checkpoint.load(tmp_path / "latest.pt")["val_losses"][-1][1]
    assert columns == 40 or f"val {last:.4f}" in bars[-1]
    banner = shown.decode().split("evaluating")[0].replace("\r", "").splitlines()
    assert any(re.fullmatch(r"  .*--warmup_steps 1", line) for line in banner)  # a warning, wrapped
    assert any(line.startswith("        ") for line in banner) and all(
        len(line) <= columns for line in banner if "/" not in line)


def test_patience_ends_a_run_that_gains_nothing(inputs, tmp_path, capsys):
    """Exit 0, saved, said; resumed it ends at once again, and goes on without patience."""
    assert train(inputs, tmp_path, "--learning_rate", 10, "--patience", 2) == 0
    assert [step for step, _ in checkpoint.load(tmp_path / "latest.pt")["val_losses"]] == [0, 4, 8]
    out = capsys.readouterr().out
    assert "stopped, as 2 evaluations gained nothing (--patience 0 goes on) at step 8" in out
    assert re.search(r"warning +the model never got better than it was before training", out)
    for flags, step in (((), 8), (("--patience", 0, "--override", "--max_steps", 9), 9)):
        assert resume(tmp_path, "latest", *flags) == 0 and checkpoint.load(tmp_path / "latest.pt")["step"] == step


def test_the_end_says_which_model_is_best_and_what_to_do_next(inputs, tmp_path, capsys, monkeypatch):
    """The losses of the evaluations are made up."""
    losses = iter([7.0, 5.0, 6.0, 6.5])
    monkeypatch.setattr("training.loop.evaluate", lambda *_, **__: next(losses))
    assert train(inputs, tmp_path / "a run", "--max_steps", 12) == 0
    out, folder = capsys.readouterr().out, tmp_path / "a run"
    pairs = [line.partition("  ") for line in out[out.index("\nfinished"):].splitlines()]
    lines = {name: text.strip() for name, _, text in pairs}
    assert f"finished at step 12; the run's state is {folder}/latest.pt" in lines
    assert re.fullmatch(r"12 steps, \d\.\d\d epochs, [\d,]+ tokens; 12 steps in 0:0.:.. since this start",
                        lines["trained"])
    assert lines["best"] == f"val loss 5.0000, at step 4, in {folder}/best_model.pt"
    assert lines["val loss"] == "7.0000 before training, 6.5000 at step 12"
    assert "--max_steps 4 would have done" in lines["note"]
    assert lines["chat"] == f"./chat.sh '{folder}/best_model.pt'"
    command = rf"\S*python[\d.]* src/convert_checkpoint.py export '{folder}/best_model.pt' exported"
    assert re.fullmatch(command, lines["export"])
    assert checkpoint.load(folder / "best_model.pt")["step"] == 4


def test_loss_on_all_trains_every_token_but_the_first(tmp_path):
    """As if all were response; the val loss stays that of responses."""
    examples = random_examples(12, 60)
    ones = [(tokens, [1] * len(tokens)) for tokens, _ in examples]
    results = []
    for name, rows, loss_on in (("all", examples, "all"), ("ones", ones, "response")):
        folder = write_data(tmp_path / name, {"train": rows, "val": rows})
        data = InstructData(open_prepared(folder), "train", 1024, loss_on=loss_on)
        plan = data.plan(range(12), 256, 1)
        assert plan.response_tokens == sum(len(tokens) - 1 for tokens, _ in examples)
        results.append(train_step(learner_of(), data, plan, 1e-3).loss)
    assert results[0] == results[1]
