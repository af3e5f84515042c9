"""Checkpoints: whole or absent, checked on the way in, and never executed."""

import hashlib
import importlib
import os
import pickle
import random
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
from checkpoint import load, load_pretrained, newest_valid, save, save_step, settle, step_files
from cli import CheckpointError, UserError
from durable import durable_file
from helpers import SMALL, small_model
from model import GPTConfig

STATE = {"step": 7, "val_losses": [], "template": None, "model_config": vars(SMALL)}
CPU = torch.device("cpu")


def write_small(path: Path) -> Path:
    save(path, {"step": 1, "model_config": {}, "model": {"weight": torch.arange(3000.0)}})
    return path


def test_what_is_saved_is_loaded(tmp_path):
    model = small_model()
    save(tmp_path / "a.pt", {**STATE, "model": model.state_dict()})
    state = load(tmp_path / "a.pt")
    assert state["step"] == 7
    loaded = checkpoint.model_of(state, tmp_path / "a.pt", CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:  # any zip reader still reads it
        assert archive.testzip() is None


@dataclass
class GPTConfigOfAnotherTrainer:
    context_length: int = 64
    vocab_size: int = 50304
    num_layers: int = 2
    embd_size: int = 32
    num_heads: int = 2


def save_as(path: Path, state: object, module: str, name: str) -> Path:
    """torch.save with the config class known by another trainer's name."""
    import sys
    import types

    stand_in = types.ModuleType(module)
    GPTConfigOfAnotherTrainer.__module__, GPTConfigOfAnotherTrainer.__qualname__ = module, name
    setattr(stand_in, name, GPTConfigOfAnotherTrainer)
    before = sys.modules.get(module)
    sys.modules[module] = stand_in
    try:
        torch.save(state, path)
    finally:
        sys.modules.pop(module)
        if before is not None:
            sys.modules[module] = before
    return path


def own_weights() -> dict[str, torch.Tensor]:
    model = small_model(config=GPTConfig(64, 50304, 2, 2, 32))
    weights = model.state_dict()
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


@pytest.mark.parametrize("module, name",
                         [("model", "GPTConfig"), ("__main__", "GPTConfig"), ("src.gpt", "ModelConfig")])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_the_users_own_pretrained_file_loads_as_it_is(tmp_path, module, name, prefix):
    """A padded vocabulary, a pickled config dataclass, optimizer and random states with numpy arrays."""
    weights = {prefix + key: value for key, value in own_weights().items()}
    numpy_state = np.random.RandomState(0).get_state()
    path = save_as(tmp_path / "best_model.pt", {
        "model": weights, "config": GPTConfigOfAnotherTrainer(), "step": 1000, "val_loss": 3.1,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "rng_state": {"numpy": numpy_state, "torch": torch.get_rng_state(), "python": random.getstate(),
                      "scalar": np.float64(1.5)}}, module, name)
    config, loaded = load_pretrained(path)
    assert config == GPTConfig(64, 50304, 2, 2, 32)
    expected = own_weights()
    assert set(loaded) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


def test_other_forms_of_pretrained_files(tmp_path):
    """A bare state dict, nanoGPT's, published GPT-2 with transposed weights and mask buffers, and bf16 weights."""
    weights, path = own_weights(), tmp_path / "a.pt"
    sizes = {"block_size": 64, "vocab_size": 50304, "n_layer": 2, "n_head": 4, "n_embd": 32, "bias": True}
    expected = {key: value for key, value in weights.items() if key != "lm_head.weight"}
    for state, n_head in [(weights, 1), ({"model": weights, "model_args": sizes, "config": {"dtype": "x"}}, 4),
                          ({"model": expected, "config": {"num_heads": 2}}, 2)]:
        torch.save(state, path)
        config, loaded = load_pretrained(path)
        assert config == GPTConfig(64, 50304, 2, n_head, 32)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_layer=2, n_head=1, n_embd=64))
    published = {key.removeprefix("transformer."): value for key, value in reference.state_dict().items()
                 if key != "lm_head.weight"} | {"h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool)}
    torch.save({key: value.bfloat16() for key, value in published.items()}, path)
    config, loaded = load_pretrained(path)
    assert config == GPTConfig(16, 99, 2, 1, 64) and all(value.dtype is torch.float32 for value in loaded.values())
    torch.testing.assert_close(loaded["transformer.h.1.mlp.c_fc.weight"],
                               reference.state_dict()["transformer.h.1.mlp.c_fc.weight"].t().bfloat16().float())


def test_a_model_without_biases_gets_zeros(tmp_path):
    weights = {key: value for key, value in own_weights().items() if not key.endswith(".bias")}
    torch.save({"model": weights, "config": {"num_heads": 2}}, tmp_path / "a.pt")
    _, loaded = load_pretrained(tmp_path / "a.pt")
    assert float(sum(value.abs().sum() for key, value in loaded.items() if key.endswith(".bias"))) == 0.0


def wrong_states() -> dict[str, object]:
    weights = own_weights()
    return {
        "untied": {**weights, "lm_head.weight": weights["lm_head.weight"] + 1},
        "a missing layer": {key: value for key, value in weights.items() if "h.0.ln_1.weight" not in key},
        "a wrong shape": {**weights, "transformer.ln_f.weight": torch.ones(31)},
        "a config that lies": {"model": weights, "config": {"num_layers": 5}},
        "heads that do not divide": {"model": weights, "config": {"num_heads": 5}},
        "no model": {"model": {"weights": 3}},
        "no GPT-2": {"linear.weight": torch.ones(3, 3)},
        "a list": [1, 2, 3],
    }


@pytest.mark.parametrize("case", list(wrong_states()))
def test_what_is_no_gpt2_is_refused(tmp_path, case):
    torch.save(wrong_states()[case], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt"):
        load_pretrained(tmp_path / "a.pt")


class Malicious:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path, victim: Path) -> dict[str, Path]:
    """Twelve files, each of which would create victim, or fill memory, if anything in it were obeyed."""
    command, code = f"touch {victim}", f"open({str(victim)!r}, 'w').close()"
    weights = own_weights()
    states = {
        "os.system": {"model": Malicious(os.system, command)},
        "eval": Malicious(eval, code),
        "exec, nested": {"a": [({"b": Malicious(exec, code)},)]},
        "config": {"model": weights, "config": Malicious(os.system, command)},
        "optimizer": {"model": weights, "optimizer": {"state": {0: Malicious(eval, code)}}},
        "import": {"model": weights, "x": Malicious(importlib.import_module, "antigravity")},
        "subprocess": {"x": Malicious(subprocess.check_call, ["touch", str(victim)])},
        "popen": {"x": Malicious(os.popen, command)},
    }
    files = {}
    for number, (name, state) in enumerate(states.items()):
        files[name] = folder / f"hostile{number}.pt"
        torch.save(state, files[name])
    files["legacy format"] = folder / "legacy.pt"
    torch.save({"x": Malicious(os.system, command)}, files["legacy format"], _use_new_zipfile_serialization=False)
    files["a bare pickle"] = folder / "bare.pt"
    files["a bare pickle"].write_bytes(pickle.dumps(Malicious(os.system, command)))
    files["path traversal"] = folder / "traversal.pt"
    with zipfile.ZipFile(files["path traversal"], "w") as archive:
        archive.writestr("../../data.pkl", pickle.dumps(Malicious(os.system, command)))
        archive.writestr("../../version", "3\n")
    files["a zip bomb"] = folder / "bomb.pt"
    with zipfile.ZipFile(files["a zip bomb"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(1 << 28))
    return files


def test_twelve_hostile_files_do_nothing(tmp_path):
    victim = tmp_path / "executed"
    files = hostile_files(tmp_path, victim)
    assert len(files) == 12
    for path in files.values():
        for function in (load, load_pretrained):
            with pytest.raises(CheckpointError, match=path.name):
                function(path)
    assert not victim.exists()


def test_nothing_in_src_unpickles():
    text = "".join(path.read_text() for path in Path(checkpoint.__file__).parent.glob("*.py"))
    for forbidden in ("weights_only=False", "pickle.load", "allow_pickle=True", "import pickle"):
        assert forbidden not in text


def state_of(step: int) -> dict:
    return {"step": step, "val_losses": [], "model": {"weight": torch.full((2000,), float(step))}, "model_config": {}}


def test_steps_are_kept_by_number_and_foreign_files_are_left_alone(tmp_path):
    for name in ("best_model.pt", "step_x.pt", "step_5.pt", "notes.txt"):
        (tmp_path / name).write_text("mine")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        settle(save_step(tmp_path, state_of(step)), keep_last=2)
    assert [path.name for path in step_files(tmp_path)] == ["step_1000001.pt", "step_1000000.pt"]
    assert load(tmp_path / "latest.pt")["step"] == 1_000_001
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in
                  {"latest.pt", "step_1000000.pt", "step_1000001.pt"}) == [
        "best_model.pt", "notes.txt", "step_5.pt", "step_x.pt"]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    for step in (1, 2, 3, 4, 5):
        settle(save_step(tmp_path, state_of(step)), keep_last=5)
    settle(save_step(tmp_path, state_of(3)), keep_last=2)
    assert [int(path.stem[-6:]) for path in step_files(tmp_path)] == [5, 4, 3, 2]
    assert load(tmp_path / "latest.pt")["step"] == 3


def test_latest_falls_back_to_the_newest_valid_file_and_says_so(tmp_path):
    for step in (1, 2, 3):
        settle(save_step(tmp_path, state_of(step)), keep_last=3)
    told: list[str] = []
    os.truncate(tmp_path / "step_000003.pt", 4000)  # latest.pt is the same file
    path, state = newest_valid(tmp_path, told.append)
    assert (path.name, state["step"]) == ("step_000002.pt", 2)
    assert len(told) == 2 and "latest.pt" in told[0] and "step_000003.pt" in told[1]
    for file in tmp_path.glob("*.pt"):
        os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="none of its 4 checkpoints is valid"):
        newest_valid(tmp_path, told.append)


def test_a_folder_without_checkpoints_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume from") as caught:
        newest_valid(tmp_path, print)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="no such file") as caught:
        load(tmp_path / "absent.pt")
    assert caught.value.exit_code == 2


def test_without_hard_links_latest_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    settle(save_step(tmp_path, state_of(3)), keep_last=2)
    os.link(tmp_path / "step_000003.pt", tmp_path / "latest.pt.tmp")  # left by a kill between two calls
    monkeypatch.setattr(os, "link", refuse)
    settle(save_step(tmp_path, state_of(4)), keep_last=1)
    assert load(tmp_path / "latest.pt")["step"] == 4 == load(tmp_path / "step_000004.pt")["step"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_small(tmp_path / "a.pt")
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"a.pt: cannot write it: No space left on device \([\d,]+ bytes are needed, "):
        save(path, state_of(2))
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.pt"]


def test_older_files_stay_when_the_new_one_is_damaged_on_the_disk(tmp_path):
    for step in (1, 2):
        settle(save_step(tmp_path, state_of(step)), keep_last=2)
    path = save_step(tmp_path, state_of(3))
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="step_000003.pt: damaged"):
        settle(path, keep_last=1)
    assert [each.name for each in step_files(tmp_path)] == ["step_000003.pt", "step_000002.pt", "step_000001.pt"]
    assert newest_valid(tmp_path, lambda _: None)[1]["step"] == 2
    path.unlink()
    with pytest.raises(UserError, match="step_000003.pt: cannot read it back"):
        settle(path, keep_last=1)


def test_pieces_of_any_size_are_written_and_hashed_in_their_order(tmp_path):
    generator = random.Random(0)
    pieces = [generator.randbytes(size) for size in (1, 70_000, 5 << 20, 3, 4 << 20, 65_536, 0, 40 << 20, 17)]
    for lasting in (False, True):
        with durable_file(tmp_path / "file") as file:
            file.lasting = lasting
            for piece in pieces:
                file.write(memoryview(piece))
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)
        assert file.sha256.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.mark.parametrize("lasting", [False, True])
def test_memory_may_change_after_a_write_but_for_lasting_pieces_after_the_first_large_one(tmp_path, lasting):
    memory, written = bytearray(32 << 20), b""
    with durable_file(tmp_path / "file") as file:
        file.lasting = lasting
        for value in b"1" if lasting else b"123":
            memory[:] = bytes([value]) * len(memory)
            written += memory
            file.write(memory)
            memory[:] = bytes(len(memory))
    assert (tmp_path / "file").read_bytes() == written
    assert file.sha256.hexdigest() == hashlib.sha256(written).hexdigest()


def test_a_state_with_a_large_pickle_is_saved_whole(tmp_path):
    """Its bytes are gone when torch.save has returned."""
    state = {**state_of(1), "val_losses": [[step, 1.5] for step in range(250_000)]}
    for _ in range(3):
        save(tmp_path / "large.pt", state)
        assert load(tmp_path / "large.pt")["val_losses"] == state["val_losses"]


@pytest.mark.parametrize("size", [100, 70_000, 5 << 20])
def test_a_write_that_fails_behind_the_caller_is_told(tmp_path, size):
    (tmp_path / "file").write_text("before")
    told = "file: cannot write it: No space left on device"
    with (Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(UserError, match=told),
          durable_file(tmp_path / "file") as file):
        file.file = full
        for _ in range(3):
            file.write(b"x" * size)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]
