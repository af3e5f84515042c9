"""Checkpoints: pre-trained files of other trainers, and a run's folder, whose files are whole or absent."""

import os
import random
import resource
import sys
import types
import zipfile
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import write_checkpoint
from errors import CheckpointError, UserError
from helpers import same_state, small_model
from model import GPTConfig
from weights.checkpoint import load, model_of, newest_valid, save, save_step, step_files
from weights.pretrained import load_pretrained


def test_what_is_saved_is_loaded(tmp_path):
    model = small_model()
    path = write_checkpoint(tmp_path / "a.pt", step=7, model_config=vars(model.config), model=model.state_dict())
    state = load(path)
    assert state["step"] == 7 and zipfile.ZipFile(path).testzip() is None  # any zip reader reads it
    assert same_state(dict(model_of(state, path, torch.device("cpu")).state_dict()), dict(model.state_dict()))


# Pre-trained files of other trainers


def own_weights() -> dict[str, torch.Tensor]:
    weights = small_model(config=GPTConfig(64, 50304, 2, 2, 32)).state_dict()
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


@pytest.mark.parametrize("module, name, prefix", [
    ("model", "GPTConfig", ""), ("__main__", "GPTConfig", "_orig_mod."), ("model", "GPTConfig", "module."),
    ("src.gpt", "ModelConfig", "_orig_mod.module.")])
def test_the_users_own_pretrained_file_loads_as_it_is(tmp_path, monkeypatch, module, name, prefix):
    """A padded vocabulary, a pickled config dataclass, optimizer and random states with numpy arrays."""
    expected = own_weights()
    config_class = make_dataclass(name, [(field, int, size) for field, size in {
        "context_length": 64, "vocab_size": 50304, "num_layers": 2, "embd_size": 32, "num_heads": 2}.items()])
    config_class.__module__ = module
    state = {"model": {prefix + key: value for key, value in expected.items()}, "config": config_class(),
             "step": 1000, "val_loss": 3.1,
             "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
             "rng_state": {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state(),
                           "python": random.getstate(), "scalar": np.float64(1.5)}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{name: config_class}))
        torch.save(state, tmp_path / "best_model.pt")
    config, loaded = load_pretrained(tmp_path / "best_model.pt")
    del expected["lm_head.weight"]
    assert config == GPTConfig(64, 50304, 2, 2, 32) and same_state(loaded, expected)


def test_other_forms_of_pretrained_files(tmp_path):
    """A bare state dict, nanoGPT's, one without biases, published GPT-2 with mask buffers, in bf16."""
    weights, path = own_weights(), tmp_path / "a.pt"
    expected = {key: value for key, value in weights.items() if key != "lm_head.weight"}
    biases = {key: torch.zeros_like(value) for key, value in expected.items() if key.endswith(".bias")}
    sizes = {"block_size": 64, "vocab_size": 50304, "n_layer": 2, "n_head": 4, "n_embd": 32, "bias": True}
    for state, n_head, zeros in [
            (weights, 1, {}), ({"model": weights, "model_args": sizes, "config": {"dtype": "x"}}, 4, {}),
            ({"model": expected, "config": {"num_heads": 2}}, 2, {}),
            ({key: value for key, value in expected.items() if key not in biases}, 1, biases)]:
        torch.save(state, path)
        config, loaded = load_pretrained(path)
        assert config == GPTConfig(64, 50304, 2, n_head, 32) and same_state(loaded, {**expected, **zeros})
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_layer=2, n_head=1, n_embd=64)).state_dict()
    published = {key.removeprefix("transformer."): value.bfloat16() for key, value in reference.items()
                 if key != "lm_head.weight"}
    torch.save({**published, "h.0.attn.bias": torch.ones(1, 1, 16, 16).bool()}, path)
    config, loaded = load_pretrained(path)
    assert config == GPTConfig(16, 99, 2, 1, 64) and all(value.dtype is torch.float32 for value in loaded.values())
    assert torch.equal(loaded["transformer.h.1.mlp.c_fc.weight"], published["h.1.mlp.c_fc.weight"].t().float())


WRONG = {
    "untied": lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"] + 1},
    "a missing layer": lambda weights: {k: value for k, value in weights.items() if "h.0.ln_1.weight" not in k},
    "a wrong shape": lambda weights: {**weights, "transformer.ln_f.weight": torch.ones(31)},
    "a config that lies": lambda weights: {"model": weights, "config": {"num_layers": 5}},
    "heads that do not divide": lambda weights: {"model": weights, "config": {"num_heads": 5}},
    "no model": lambda _: {"model": {"weights": 3}},
    "no GPT-2": lambda _: {"linear.weight": torch.ones(3, 3)},
    "a list": lambda _: [1, 2, 3],
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_gpt2_is_refused(tmp_path, case):
    torch.save(WRONG[case](own_weights()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt"):
        load_pretrained(tmp_path / "a.pt")


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
