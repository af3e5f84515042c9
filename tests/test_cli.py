"""The edge of every script: help without heavy imports, wrong flags, exit codes, the launchers, the demo."""

import json
import os
import sys
from pathlib import Path

import pytest

import prepare_instruct_dataset
from cli import printable, printable_line
from conftest import SRC, Outcome, launch, run_command, run_script
from helpers import resume_flags, run_inputs, to
from instruct_format import tokenizer


@pytest.mark.parametrize("script", ["prepare_instruct_dataset.py", "train_instruct.py", "chat.py",
                                    "convert_checkpoint.py", "evaluate_instruct.py"])
def test_help_imports_nothing_heavy(script):
    code, stdout, stderr = run_command(sys.executable, "-X", "importtime", SRC / script, "--help")
    imported = {line.rpartition("|")[2].strip() for line in stderr.splitlines()}
    assert code == 0 and stdout.startswith("usage: ") and stderr.count("\n") == stderr.count("import time:")
    heavy = {"torch", "datasets", "pyarrow"} | ({"numpy", "tiktoken"} if "prepare" not in script else set())
    assert "argparse" in imported and not imported & heavy
    assert "say) (default" not in " ".join(stdout.split())  # a default is said once


def test_training_does_not_import_the_compiler(tmp_path):
    """It would take as long as all of PyTorch, at each start."""
    flags = [*resume_flags(*run_inputs(tmp_path)), *to(tmp_path), "--checkpoint_freq", 2]
    for more in (["--max_steps", 2], ["--max_steps", 4, "--resume", "auto", "--override"]):
        done = run_command(sys.executable, "-X", "importtime", SRC / "train_instruct.py", *flags, *more)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert done.code == 0 and (tmp_path / f"step_00000{more[1]}.pt").exists()
        assert "torch.optim" in imported and not imported & {"torch._dynamo", "sympy"}


def test_the_cpus_that_a_job_has_are_those_that_are_used(run_main, monkeypatch):
    for cpus, quota, count in [({3}, "max 100000", 1), ({*range(9)}, "350000 100000\n", 3), ({1, 2}, "5 100", 1),
                               ({*range(9)}, "", 9)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: cpus)
        monkeypatch.setattr(Path, "read_text", lambda _, quota=quota: quota)  # of a container's group
        said = run_main(prepare_instruct_dataset.main, "--help").stdout
        assert f"tokenizers work at once (default: {count})" in " ".join(said.split())


@pytest.mark.parametrize("script, flags, message", [
    ("train_instruct.py", ["--learning_rat=1"], "arguments: --learning_rat=1 (did you mean --learning_rate? --help"),
    ("train_instruct.py", ["--dry_run", "latest"], "unrecognized arguments: latest (words without -- come first; "),
    ("train_instruct.py", ["--max_steps", "0"], "--max_steps: 0 is not at least 1"),
    ("train_instruct.py", ["--total_batch_size", str(10**12)], "000 is not at least 1 and at most 1073741824"),
    ("train_instruct.py", ["--epochs", "3", "--max_steps", "9"], "--max_steps: not allowed with argument --epochs"),
    ("train_instruct.py", ["--loss_on", "some"], "--loss_on: expected response or all, not 'some'"),
    ("train_instruct.py", ["--learning_rate", "nan"], "--learning_rate: nan is not above 0"),
    ("train_instruct.py", ["--device", "mps"], "--device mps: no such device here"),
    ("prepare_instruct_dataset.py", ["--val_fraction", "1"], "--val_fraction: 1 is not above 0 and at most 0.99"),
    ("prepare_instruct_dataset.py", ["data.jsonl"], "unrecognized arguments: data.jsonl"),
    ("chat.py", ["--temperature", "-1"], "--temperature: -1 is not at least 0"),
    ("convert_checkpoint.py", [], "the following arguments are required: import|export"),
])
def test_wrong_flags_are_one_line_and_exit_code_2(script, flags, message, tmp_path):
    said = run_script(script, *flags, cwd=tmp_path).refusal()
    assert said.startswith("error: ") and message in said


def test_printable_leaves_text_and_escapes_everything_else():
    assert printable("naïve 漢字 🚀\ta\n") == "naïve 漢字 🚀\ta\n"
    assert printable_line("a\nb\tc\r\x1b[2J") == "a\\nb\\tc\\r\\x1b[2J"
    assert printable("\x00\x7f\x9b\u202e\u2066\ud800") == "\\x00\\x7f\\x9b\\u202e\\u2066\\ud800"


def start(folder: Path, *arguments: object) -> Outcome:
    return launch(folder, "start_instruct_training.sh", *arguments)


def test_the_launcher_trains_resumes_and_passes_on_exit_codes(project):
    run = project / "run"
    inputs = [*resume_flags(*run_inputs(project)), *to(run)]
    code, stdout, stderr = start(project, 2, *inputs, "--max_steps", 3)
    assert code == 0, stderr
    assert "device  cpu, 2 processes" in stdout and stdout.count("\nstep 3/3 ") == 1
    code, stdout, _ = start(project, run / "step_000002.pt", "--max_steps", 4, "--override")
    assert code == 0 and f"resumed from {run}/step_000002.pt at step 2" in stdout
    (run / "latest.pt").write_bytes(b"no checkpoint")
    for number, flags, message in [(2, inputs, "a run is here already"), (3, [2, run / "latest.pt"], "not a loadable")]:
        code, _, stderr = start(project, *flags)
        assert (code, stderr.count("\n")) == (number, 1) and f"{run}/latest.pt: {message}" in stderr
    assert start(project, 0).code == start(project, 99999).code == 2
    for script in ("start_instruct_training.sh", "chat.sh"):  # sh may be no bash
        found = run_command("sh", project / script, "--help", env={"VIRTUAL_ENV": sys.prefix})
        assert found.code == 0 and found.stdout.startswith(f"usage: ./{script} ")
    code, stdout, stderr = start(project, 2, "--help")
    assert (code, stderr) == (0, "") and stdout.startswith("usage: ./start_instruct") and "\n  --eval_freq " in stdout


def test_the_demo_data_hold_what_the_demo_promises():
    """Per fact one wording is kept for the end, and no question stands on both sides."""
    rows = [json.loads(line) for line in (SRC / "demo_dataset.jsonl").read_text().splitlines()]
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    assert len(rows) >= 600 and len(val) >= 100
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(train) + len(val)
    answers = [row["output"] for row in train]
    assert all(answers.count(row["output"]) >= 5 for row in val)
    assert all(row["output"].count(". ") == 0 and len(tokenizer().encode_ordinary(row["output"])) < 40 for row in rows)


def test_the_demo_keeps_the_last_one_until_it_has_a_model_and_passes_on_exit_codes(project):
    (project / "demo" / "checkpoints").mkdir(parents=True)
    for path in (kept := project / "demo/checkpoints/kept", mine := project / "demo/mine"):
        path.write_text("no checkpoint")
    code, stdout, stderr = start(project, "demo", "--help")
    assert (code, stderr, kept.exists()) == (0, "", True) and "./start_instruct_training.sh demo [flags" in stdout
    for flags, message in [(["--max_step", "3"], "unrecognized arguments: --max_step 3"),
                           (["--max_steps", "none"], "argument --max_steps: invalid int value: 'none'"),
                           (["--resume", "latest"], "the demo makes all anew in demo/, so it takes no --resume"),
                           (["--dry_run"], "the demo makes all anew in demo/, so it takes no --dry_run"),
                           (["--total_batch_size", "64"], "--total_batch_size 64 is below --context_length 128"),
                           (["--learning_rate", "1e30", "--max_steps", "2"], "the val loss is nan, up to step 2; ")]:
        code, _, stderr = start(project, "demo", *flags)
        assert (code, stderr.count("\n"), kept.exists()) == (4 if "nan" in message else 2, 1, True)
        assert stderr.startswith(f"error: {message}")
    assert mine.exists() and not (project / "demo/before").exists()


@pytest.mark.slow  # .ci/run runs the demo itself
def test_the_demo_runs_from_end_to_end(project):
    """Two steps of it, in another folder: every script is called, and only demo/ appears."""
    before = {path.name for path in project.iterdir()}
    code, stdout, stderr = start(project, "demo", "--epochs", "0.1", "--warmup_steps=1")
    assert code == 0, stderr
    assert "  repeated  " in stdout and "./chat.sh demo" in stdout
    assert {path.name for path in project.iterdir()} == before | {"demo"}
    assert launch(project, "chat.sh", "demo", "--prompt", "Hello").code == 0
