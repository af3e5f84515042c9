"""A training run prints and logs no text that drives a terminal, and takes no state that means harm."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

import checkpoint
import prepare_instruct_dataset
from checkpoint import LATEST, save
from cli import CheckpointError
from conftest import run_script, write_jsonl
from helpers import options_of
from resume import _check_moments, state_to_resume
from test_damage import run_state
from test_hostile_texts import PAYLOADS, RAW

FORGED: dict[str, Any] = {
    "position of another type": {"position": "ab"}, "negative position": {"position": [0, -5]},
    "huge position": {"position": [10**30, 0]}, "no position": {"position": None},
    "name that leads outside": {"name": "../../escaped"}, "absolute name": {"name": "/tmp/escaped"},
    "name of another type": {"name": 7}, "name with NUL": {"name": "a\0b"}, "name for a terminal": {"name": "\x1b[2J"},
    "negative step": {"step": -5}, "huge step": {"step": 10**30}, "skipped is text": {"skipped": "x"},
    "options are a list": {"options": [1]}, "option of another type": {"options": {"max_steps": "x"}},
    "option out of bounds": {"options": {"mini_batch_size": -1}},
    "option NaN": {"options": {"learning_rate": float("nan")}},
    "folder that is a number": {"options": {"data_dir": 7}}, "fingerprint of another type": {"data_fingerprint": 7},
    "optimizer of another type": {"optimizer": 7}, "whole numbers for weights": {
        "model": {name: tensor.long() for name, tensor in run_state(1)["model"].items()}},
    "weights of another kind": {"model": {"a": torch.ones(1, device="meta")}},
    "numbered weights": {"model": {5: torch.ones(1)}},
    "a terabyte of four bytes": {"model": {"a": torch.zeros(1).expand(1 << 38)}},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_state_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.setattr(checkpoint, "size_of", lambda _: 0)
    path = tmp_path / "step_000003.pt"
    state = {**run_state(3), "options": {k: v for k, v in vars(options_of("--pretrained_model", "x")).items()
                                         if k not in ("resume", "override", "device")}}
    save(path, state)
    state_to_resume(Namespace(resume=str(path)), tmp_path, True)
    save(path, {**state, **FORGED[case]})
    with pytest.raises(CheckpointError, match="step_000003.pt"):
        state_to_resume(Namespace(resume=str(path)), tmp_path, True)


@pytest.mark.parametrize("change", [{"n_layer": 10**7}, {"vocab_size": 10**30}, {"n_embd": 2**40}])
def test_a_huge_configuration_is_refused_at_once(tmp_path, change):
    state = run_state(3)
    with pytest.raises(CheckpointError, match="a.pt"):
        checkpoint.model_of({**state, "model_config": {**state["model_config"], **change}}, tmp_path / "a.pt",
                            torch.device("cpu"))


def test_moments_of_another_shape_are_refused():
    """Fused AdamW would read and write beyond them."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    _check_moments(optimizer, may_be_absent=True)
    with pytest.raises(ValueError):
        _check_moments(optimizer, may_be_absent=False)
    weight.sum().backward()
    optimizer.step()
    _check_moments(optimizer, may_be_absent=False)
    optimizer.state[weight]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError):
        _check_moments(optimizer, may_be_absent=True)


def test_a_run_prints_and_logs_no_payload(tmp_path):
    """All payloads in the prompts that TensorBoard shows, and in the names of the folders; then a resume that skips."""
    evil = "".join(PAYLOADS).replace("/", "|")[:60]
    rows = [{"instruction": "".join(PAYLOADS), "input": "", "output": "x", "split": "val"},
            {"instruction": "y", "input": "", "output": "y", "split": "train"}]
    data, run, log = (tmp_path / f"{name}{evil}" for name in ("data", "run", "log"))
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare_instruct_dataset.main(["--dataset", str(source), "--output_dir", str(data)])
    flags = ["--data_dir", data, "--checkpoint_dir", run, "--tensorboard_dir", log, "--device", "cpu",
             "--max_steps", "2", "--checkpoint_freq", "1"]
    first = run_script("train_instruct.py", *flags, "--from_scratch", "1,1,8", "--context_length", "512",
                       "--total_batch_size", "512")
    assert first.code == 0, first.stderr
    for name in (LATEST, "step_000002.pt"):
        (run / name).unlink()
        (run / name).write_bytes(b"junk")
    second = run_script("train_instruct.py", *flags, "--resume", "latest")
    assert second.code == 0 and second.stdout.count("skipped ") == 2, second.stderr
    assert not RAW.search(first.stdout + first.stderr + second.stdout + second.stderr)
    events = b"".join(path.read_bytes() for path in log.rglob("events*"))
    assert rb"\x1b[2J" in events and not any(raw in events for raw in (b"\x1b[", b"\x1b]", b"\x1bP", b"\xc2\x9b2J"))
