"""The edge of every script: help without heavy imports, wrong flags, exit codes, the launchers, the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import score_answers
from cli import printable, printable_line
from conftest import ROOT, SRC, run_command, run_script
from helpers import random_examples, resume_flags, small_model, write_data, write_pretrained
from instruct_format import tokenizer

SCRIPTS = ["prepare_instruct_dataset.py", "train_instruct.py", "chat.py", "convert_checkpoint.py", "score_answers.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    program = (f"import sys; sys.argv = ['{script}', '--help']; sys.path.insert(0, {str(SRC)!r})\n"
               f"import runpy\ntry: runpy.run_path({str(SRC / script)!r}, run_name='__main__')\n"
               "finally: print(sorted({'torch', 'numpy', 'tiktoken', 'datasets', 'pyarrow'} & set(sys.modules)))")
    code, stdout, stderr = run_command(sys.executable, "-c", program)
    assert (code, stderr) == (0, "")
    assert stdout.startswith("usage: ") and stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("script, flags, message", [
    ("train_instruct.py", ["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
    ("train_instruct.py", ["--max_steps", "0"], "--max_steps: 0 is not at least 1"),
    ("train_instruct.py", ["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
    ("train_instruct.py", ["--learning_rate", "nan"], "--learning_rate: nan is not above 0"),
    ("train_instruct.py", ["--learning_rate", "inf"], "--learning_rate: inf is not above 0"),
    ("train_instruct.py", ["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ("train_instruct.py", ["--device", "cuda"], "--device cuda: no such device here"),
    ("prepare_instruct_dataset.py", ["--val_fraction", "1"], "--val_fraction: 1 is not above 0 and at most 0.99"),
    ("prepare_instruct_dataset.py", ["data.jsonl"], "unrecognized arguments: data.jsonl"),
    ("chat.py", ["--top_p", "0"], "--top_p: 0 is not above 0 and at most 1"),
    ("chat.py", ["--temperature", "-1"], "--temperature: -1 is not at least 0"),
    ("convert_checkpoint.py", [], "the following arguments are required: command"),
    ("score_answers.py", ["--checkpoint", "absent.pt"], "absent.pt: no such checkpoint"),
])
def test_wrong_flags_are_one_line_and_exit_code_2(script, flags, message, tmp_path):
    if "cuda" in flags:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    code, stdout, stderr = run_script(script, *flags, cwd=tmp_path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("error: ") and message in stderr


def test_printable_leaves_text_and_escapes_everything_else():
    assert printable("naïve 漢字 🚀\ta\n") == "naïve 漢字 🚀\ta\n"
    assert printable_line("a\nb\tc\r\x1b[2J") == "a\\nb\\tc\\r\\x1b[2J"
    assert printable("\x00\x7f\x9b\u202e\u2066\ud800") == "\\x00\\x7f\\x9b\\u202e\\u2066\\ud800"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Flags of a short run of a small model."""
    folder = tmp_path_factory.mktemp("inputs")
    data_dir = write_data(folder / "data", {"train": random_examples(60, 64), "val": random_examples(15, 64, seed=1)})
    return resume_flags(data_dir, write_pretrained(folder / "pretrained.pt", small_model()))


def launch(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Through the launcher, with this interpreter's environment as the active one."""
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return run_command(ROOT / "start_instruct_training.sh", *map(str, arguments), env={**active, **environment})


def test_the_launcher_trains_resumes_and_passes_on_exit_codes(inputs, tmp_path):
    folders = ["--checkpoint_dir", tmp_path, "--tensorboard_dir", tmp_path / "runs"]
    code, stdout, stderr = launch(2, *inputs, *folders, "--max_steps", 3)
    assert code == 0, stderr
    assert "device  cpu, 2 processes" in stdout and stdout.count("\nstep 3/3 ") == 1
    code, stdout, stderr = launch(*inputs, *folders)
    assert (code, stderr) == (2, f"error: {tmp_path}/latest.pt: a run is here already; --resume latest goes on with "
                                 "it, another --checkpoint_dir starts a new one\n")
    code, stdout, _ = launch(tmp_path / "step_000002.pt", *folders, "--max_steps", 4, "--override")
    assert code == 0 and f"resumed from {tmp_path}/step_000002.pt at step 2" in stdout
    (tmp_path / "latest.pt").write_bytes(b"no checkpoint")
    code, _, stderr = launch(2, tmp_path / "latest.pt", *folders)
    assert (code, stderr.count("\n")) == (3, 1) and f"{tmp_path}/latest.pt: " in stderr
    assert launch(0)[0] == 2 and launch("--help")[0] == 0


def test_a_launcher_without_an_environment_says_what_to_do(tmp_path):
    """A Python that cannot import torch, and no .venv."""
    (tmp_path / "src").mkdir()
    for name in ("start_instruct_training.sh", "chat.sh", "src/environment.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    for command in (["./chat.sh"], ["./start_instruct_training.sh"], ["./start_instruct_training.sh", "demo"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "no environment with the requirements" in done.stderr or "older than 3.10" in done.stderr


def test_score_counts_exact_answers(monkeypatch, capsys, tmp_path):
    """Three of four answers are exact; an answer that begins right and goes on is not."""
    results = [score_answers.Scored("### Instruction:\nQ\n\n### Response:\n", "yes", answer)
               for answer in ("yes", "yes", "yes", "yes and no")]
    monkeypatch.setattr(score_answers, "scored_answers", lambda options: iter(results))
    (tmp_path / "a.pt").touch()
    assert score_answers.main(["--checkpoint", str(tmp_path / "a.pt"), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("exact answers: 3 of 4 (75.0 %)\n") and out.count(" -> ") == 2


def test_the_demo_data_hold_what_the_demo_promises():
    """Per fact one wording is held out, and no question stands on both sides."""
    rows = [json.loads(line) for line in (SRC / "demo_dataset.jsonl").read_text().splitlines()]
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    assert len(rows) >= 600 and len(val) >= 100
    prompts = [{(row["instruction"], row["input"]) for row in side} for side in (train, val)]
    assert len(prompts[0]) == len(train) and len(prompts[1]) == len(val) and not prompts[0] & prompts[1]
    answers = [row["output"] for row in train]
    assert all(answers.count(row["output"]) >= 5 for row in val)
    assert all(row["output"].count(". ") == 0 and len(tokenizer().encode_ordinary(row["output"])) < 40 for row in rows)


def test_a_wrong_flag_does_not_cost_the_last_demo(tmp_path):
    kept = tmp_path / "demo" / "kept"
    kept.parent.mkdir()
    kept.write_text("a model")
    for flags, code in ([["--help"], 0], [["--max_step", "3"], 2], [["--max_steps", "none"], 2]):
        assert run_script("demo.py", *flags, cwd=tmp_path).code == code
        assert kept.read_text() == "a model"


@pytest.mark.slow  # .ci/run runs the demo itself
def test_the_demo_runs_from_end_to_end(tmp_path):
    """Two steps of it, in another folder: every script is called, and only demo/ appears."""
    (tmp_path / "src").symlink_to(SRC)
    code, stdout, stderr = run_script("demo.py", "--max_steps", "2", cwd=tmp_path)
    assert code == 0, stderr
    assert "exact answers: " in stdout and "./chat.sh demo" in stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "src"]
    chat = run_script("chat.py", "--checkpoint", "demo/checkpoints/best_model.pt", "--prompt", "Hello", cwd=tmp_path)
    assert chat.code == 0
