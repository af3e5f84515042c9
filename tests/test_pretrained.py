"""Weights as other programs write them are read as they are meant; what is no GPT-2 says what to do next."""

import argparse
import json
import os
import random
import re
import struct
import sys
import types
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import chat
import convert_checkpoint
import train_instruct
from conftest import write_jsonl
from data_files import row
from errors import CheckpointError, UserError
from helpers import prepare, train
from model import GPT, Documents, GPTConfig
from models import same_state, small_model, write_pretrained
from weights.checkpoint import load, model_of
from weights.pretrained import config_of, open_any

PADDED, CUT = (GPTConfig(64, vocab_size, 2, 4, 32) for vocab_size in (50304, 50257))
Weights = dict[str, torch.Tensor]


def with_output(weights: Weights) -> Weights:
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


@pytest.fixture(scope="module")
def weights() -> Weights:
    """With rows of padding that show wherever they are used."""
    weights = dict(small_model(config=PADDED).state_dict())
    weights[EMBEDDING][50257:] = torch.nan
    return weights


def cut(weights: Weights) -> Weights:
    """Without the rows of padding after GPT-2's vocabulary, which no file of another program keeps."""
    return {name: tensor[:50257].clone() if len(tensor) == 50304 else tensor for name, tensor in weights.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in with_output(weights).items()}


def says(**config: Any) -> Callable[[Weights], Any]:
    return lambda weights: {"model": weights, "config": {"n_head": 4, **config}}


NANOGPT = {"block_size": 64, "vocab_size": 50304, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}
OWN: dict[str, Callable[[Weights], Any]] = {  # what torch.save gets: as the programs of this name do it
    "nanoGPT": lambda weights: {"model": prefixed("_orig_mod.", weights), "model_args": {**NANOGPT, "bias": True},
                                "optimizer": {"state": {}, "param_groups": []}, "iter_num": 9, "best_val_loss": 3.1,
                                "config": {"dtype": "bfloat16", "n_head": 12}},
    "nanoGPT without bias": lambda weights: {"model": prefixed("", {
        name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}), "model_args": NANOGPT},
    "masks": lambda weights: {"model": {**weights, "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
                                        "transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64).bool()},
                              "config": {"num_heads": 4}},
    "state_dict": lambda weights: {"state_dict": prefixed("model.", weights), "config": {"n_head": 4}},
    "model_state_dict": lambda weights: {"model_state_dict": prefixed("module.", weights), "config": {"n_head": 4}},
    "an average of wrapped blocks": lambda weights: {"state_dict": {"n_averaged": torch.tensor(7), **{
        "module." + name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in weights.items()}},
        "config": {"n_head": 4}},
    "a padded output": lambda weights: {"model": {**cut(weights), "lm_head.weight": weights["transformer.wte.weight"]},
                                        "config": {"n_head": 4}},
    "a padded embedding": lambda weights: {"model": {**weights, **cut({"lm_head.weight": weights[EMBEDDING]})},
                                           "config": {"n_head": 4, "vocab_size": 50257}},
    "Lightning": lambda weights: {"state_dict": prefixed("model.", weights), "hyper_parameters": {
        "n_layers": 2, "n_heads": 4, "lr": 1e-4}},
    "arguments, Parameters, a name": lambda weights: {
        "model": "gpt2", "args": argparse.Namespace(optimizer="adamw", block_size=32, num_attention_heads=4),
        "state_dict": {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}},
    "a config in a config": lambda weights: {"model": weights, "config": {"lr": 1e-4, "model": {"n_head": 4}}},
    "heads of two models": lambda weights: {"model": weights, "config": {"num_heads": 4}, "teacher": {"n_head": 8}},
    "configs of other models": lambda weights: {"model": weights, "config": {"n_head": 4}, "vision": {
        "layer_norm_eps": 1e-12}, "teacher": {"n_head": 8, "activation_function": "relu"}},
    "sizes under model": lambda weights: {"model": {"n_head": 4}, "state_dict": weights},
    "DeepSpeed": lambda weights: {"module": prefixed("module.", weights), "args": {"num_heads": 4}, "ds_version": "1"},
    "no transformer": lambda weights: {"model": {name.removeprefix("transformer."): tensor for name, tensor in
                                                 with_output(weights).items()}, "config": {"n_head": 4}},
    "one of two tied": lambda weights: {"model": {name.replace("transformer.wte", "lm_head"): tensor for name, tensor in
                                                  weights.items()}, "config": {"n_head": 4}},
    "back from GGUF": says(layer_norm_epsilon=9.999999747378752e-06),
    "own names": lambda weights: {"model": weights, "model_config": {"context_length": 64, "num_layers": 2,
                                                                     "num_heads": 4, "embd_size": 32}},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("program", OWN)
def test_files_of_other_trainers_load_as_they_are(tmp_path, weights, program, is_zip):
    torch.save(OWN[program](weights), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    state = open_any(tmp_path / "a.pt")
    expected = cut(weights) if program != "nanoGPT without bias" else {
        name: torch.zeros_like(tensor) if name.endswith(".bias") else tensor for name, tensor in cut(weights).items()}
    assert GPTConfig(**state["model_config"]) == CUT and same_state(state["model"], expected)
    assert not any(tensor.requires_grad for tensor in state["model"].values())
    assert state["model"][EMBEDDING].untyped_storage().nbytes() == 50257 * 32 * 4  # what a checkpoint of it has
    assert (state["template"], state["multi_turn"], state["data_source"]) == (None, False, "")
    assert state["left_out"] == 47 * (program != "a padded output")


@pytest.mark.parametrize("module, name, prefix", [
    ("model", "GPTConfig", ""), ("__main__", "GPTConfig", "_orig_mod."),
    ("src.gpt", "ModelConfig", "_orig_mod.module."), ("pathlib._local", "PosixPath", "")])
def test_the_users_own_pretrained_file_loads_as_it_is(tmp_path, monkeypatch, weights, module, name, prefix):
    """A padded vocabulary, a pickled config dataclass (build-nanogpt's is of __main__), optimizer and random states
    with numpy arrays."""
    config_class = make_dataclass(name, [(field, int, size) for field, size in {
        "context_length": 64, "vocab_size": 50304, "num_layers": 2, "embd_size": 32, "num_heads": 4}.items()])
    config_class.__module__ = module
    state = {"model": prefixed(prefix, weights), "config": config_class(), "step": 1000, "val_loss": 3.1,
             "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
             "rng_state": {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state(),
                           "python": random.getstate(), "scalar": np.float64(1.5)}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{name: config_class}))
        for is_zip in (True, False):
            torch.save(state, tmp_path / f"{is_zip}.pt", _use_new_zipfile_serialization=is_zip)
    for path in tmp_path.glob("*.pt"):
        loaded = open_any(path)
        assert GPTConfig(**loaded["model_config"]) == CUT and same_state(loaded["model"], cut(weights))


def as_bin(model: GPT2LMHeadModel, folder: Path) -> list[str]:
    """In two parts, without an index. Returns their names."""
    model.config.save_pretrained(folder)
    items, names = list(model.state_dict().items()), [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for number, name in enumerate(names):
        torch.save(dict(items[number::2]), folder / name)
    return names


def parts_of_two(model: GPT2LMHeadModel, folder: Path) -> None:
    """The index says which of them are the model; a single file would come before it, the other index after."""
    other = GPT2LMHeadModel(model.config)
    other.save_pretrained(folder, max_shard_size="30KB")
    for path in folder.glob("model-*"):
        path.rename(path.with_name(path.name.replace("-of-0", "-of-1")))
    as_bin(other, folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "absent.bin"}}')
    model.save_pretrained(folder, max_shard_size="100KB")


def parts_without_index(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors.index.json").unlink()


def bin_with_index(model: GPT2LMHeadModel, folder: Path) -> None:
    names = as_bin(model, folder)
    torch.save({"wte.weight": torch.zeros(3)}, folder / "pytorch_model-00003-of-00003.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict(enumerate(names))}))


def whole_beside_index(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder / "whole")
    GPT2LMHeadModel(model.config).save_pretrained(folder, max_shard_size="100KB")
    (folder / "whole" / "model.safetensors").rename(folder / "model.safetensors")


FOLDERS: dict[str, Callable[[GPT2LMHeadModel, Path], None]] = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "without head": lambda model, folder: model.transformer.save_pretrained(folder),
    "parts of two": parts_of_two, "parts without index": parts_without_index,
    "bin with index": bin_with_index, "whole and index": whole_beside_index,
}


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=48, n_layer=2, n_head=4, n_inner=192)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form, activation", [*((form, "gelu_new") for form in FOLDERS),
                                              *(("safetensors", f"gelu_{name}") for name in (
                                                  "pytorch_tanh", "fast", "python_tanh", "accurate"))])
def test_folders_of_transformers_have_its_logits(tmp_path, reference, form, activation):
    folder = tmp_path / "model"
    folder.mkdir()
    FOLDERS[form](reference, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": activation}))
    model = model_of(open_any(folder), folder)
    tokens = torch.randint(0, 50257, (32,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens, Documents.of([32]))), reference(tokens[None]).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    if "without index" not in form:  # else transformers takes the same files
        loaded = GPT2LMHeadModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in reference.state_dict().items())


def test_safetensors_are_known_by_their_content(tmp_path, weights):
    save_file({name: tensor.contiguous() for name, tensor in cut(weights).items()}, tmp_path / "best_model.pt")
    assert same_state(open_any(tmp_path / "best_model.pt", n_head=4)["model"], cut(weights))


def test_16_bit_weights_become_fp32(tmp_path, reference):
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}, tmp_path / "a.pt")
        found = open_any(tmp_path / "a.pt", n_head=4)["model"]["transformer.h.1.mlp.c_fc.weight"]
        assert torch.equal(found, reference.state_dict()["transformer.h.1.mlp.c_fc.weight"].t().to(dtype).float())


def test_heads_are_never_guessed(tmp_path, weights, capsys):
    path, ours = tmp_path / "a b.pt", write_pretrained(tmp_path / "ours.pt", small_model())
    torch.save(with_output(weights), path)
    advice = rf"\S*python[\d.]* src/convert_checkpoint.py import '{path}' --n_head N --output NEW.pt; then name NEW.pt$"
    with pytest.raises(UserError, match=rf"how many heads its 2 layers of width 32 have.*; say it: {advice}") as caught:
        open_any(path)
    assert caught.value.exit_code == 2
    assert convert_checkpoint.main(["import", str(path), "--n_head", "4", "--output", f"{tmp_path}/new.pt"]) == 0
    said = "2 layers of 4 heads, width 32, without the 47 rows after GPT-2's tokens, padding or added tokens\n"
    assert capsys.readouterr().out.endswith(said)
    state = load(tmp_path / "new.pt")
    assert GPTConfig(**state["model_config"]) == CUT and same_state(state["model"], cut(weights))
    assert convert_checkpoint.main(["import", f"{tmp_path}/new.pt", "--output", f"{tmp_path}/again.pt"]) == 0
    assert same_state(load(tmp_path / "again.pt"), state)
    with pytest.raises(CheckpointError, match="32 is not a multiple of n_head 5"):
        open_any(path, n_head=5)
    for text in ('{"n_head": 2}', '{"model": {"n_head": 2}}'):
        (tmp_path / "config.json").write_text(text)
        assert open_any(path)["model_config"]["n_head"] == 2
    nested = tmp_path / "nested" / "a.pt"
    nested.parent.mkdir()
    torch.save({"model": with_output(weights), "args": {"num_heads": 2}}, nested)
    for named in (path, ours, nested):
        with pytest.raises(CheckpointError, match="2.*4"):
            open_any(named, n_head=4)


def test_published_sizes_have_the_published_heads(tmp_path):
    config = GPTConfig(context_length=1, vocab_size=1)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    assert config_of({}, weights, tmp_path, others=[{"n_head": 12}, {"n_head": 6}]) == config == config_of(
        {}, weights, tmp_path)
    with pytest.raises(UserError, match="nothing says clearly how many heads its 12 layers"):
        config_of({}, weights, tmp_path, others=[{"n_head": 16}, {"n_head": 6}])


def changed(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Any]:
    return lambda weights: {"model": {**weights, name: tensor(weights[name])}, "config": {"n_head": 4}}


EMBEDDING, NORM = "transformer.wte.weight", "transformer.h.1.ln_1.weight"
WRONG: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "untied": (lambda weights: {**weights, "lm_head.weight": weights[EMBEDDING] + 1}, "train it again with the two "),
    "a missing layer": (lambda weights: {"model": {name: tensor for name, tensor in weights.items() if name != NORM},
                                         "config": {"n_head": 4}}, f"do not fit: {NORM} is absent, expected "),
    "a wrong shape": (changed(NORM, lambda tensor: tensor[1:]), r"do not fit: .* is \[31\], expected \[32\]"),
    "a scalar embedding": (changed(EMBEDDING, lambda _: torch.tensor(1.0)), "no GPT-2: "),
    "integers": (changed(NORM, lambda tensor: tensor.long()), "holds values of type torch.int64, not weights"),
    "NaN": (changed(NORM, lambda tensor: tensor / 0 * 0), f"{NORM} has values that are not finite"),
    "a config of other layers": (says(num_layers=5), "its config says num_layers 5, not 2"),
    "a config of other tokens": (says(vocab_size=50256), "its config says vocab_size 50256, not 50257"),
    "a config of text": (says(n_head="4"), "n_head must be a whole number of at least 1, not '4'"),
    "two numbers of heads": (lambda weights: {"model": weights, "hyper_parameters": {
        "teacher": {"n_head": 8}, "student": {"n_head": 4}}}, "--n_head N --output NEW.pt"),
    "a config that is none": (lambda weights: {"model": weights, "config": 5}, "--n_head N --output NEW.pt"),
    **{f"{key} {value}": (says(**{key: value}), f"not a GPT-2 as published: {key} {value!r}; .* take another trainer")
       for key, value in {"activation_function": "relu", "n_inner": 96, "layer_norm_eps": 1e-6}.items()},
    "untied, with a NaN": (lambda weights: {**weights, "lm_head.weight": torch.cat((
        weights[EMBEDDING][:9] * torch.nan, weights[EMBEDDING][9:] + 1))}, "train it again with the two "),
    "a nested config": (lambda weights: {"state_dict": weights, "hyper_parameters": {"config": {
        "n_head": 4, "activation_function": "relu"}}}, "not a GPT-2 as published: activation_function 'relu'"),
    "a NaN that is tied": (lambda weights: {"model": with_output({
        **weights, EMBEDDING: weights[EMBEDDING] * torch.nan}), "config": {"n_head": 4}}, f"{EMBEDDING} has values"),
    "a small vocabulary": (changed(EMBEDDING, lambda tensor: tensor[:50256]), "50,256 tokens, GPT-2's has 50,257"),
    "a large vocabulary": (changed(EMBEDDING, lambda tensor: tensor.repeat(2, 1)), "100,608 tokens, GPT-2's has 50,25"),
    "no model": (lambda _: {"model": {"weights": 3}, "ema": 5}, "no model weights in it .*; found .*'ema'"),
    "another head": (lambda weights: {"model": {**weights, "score.weight": weights[NORM]}, "config": {"n_head": 4}},
                     "score.weight is .*, expected absent; save a GPT-2 alone"),
    "LLaMA": (lambda _: {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)},
              "no GPT-2 .*found model.layers.0.mlp.up_proj.weight.*take another trainer"),
    "PEFT in a model": (lambda weights: {**weights, "transformer.h.0.lora_A.weight": torch.ones(3, 3)}, "merge it fi"),
    "PEFT": (lambda _: {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(3, 3)}, "merge it fi"),
    "a whole module": (lambda _: torch.nn.Linear(3, 3), r"a whole pickled module.*torch.save\(model.state_dict\(\)"),
    "a list": (lambda _: [1, 2, 3], "holds list, not a dictionary"),
}


@pytest.mark.parametrize("case, is_zip", [*((case, True) for case in WRONG),
                                          *((case, False) for case in ("NaN", "a whole module", "a list"))])
def test_what_is_no_gpt2_is_refused(tmp_path, weights, case, is_zip):
    make, message = WRONG[case]
    torch.save(make(weights), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=rf"^[^\n]*a.pt: .*{message}") as caught:
        model_of(open_any(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert caught.value.exit_code == (2 if "--n_head" in message else 3)


FILES: dict[str, tuple[dict[str, bytes], str, int]] = {  # files of a folder, what is said of it, exit code
    "PEFT": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "a PEFT adapter.* merge it first", 3),
    "TensorFlow": ({"model.ckpt.index": b"", "hparams.json": b"{}"}, "a TensorFlow checkpoint; .* import that", 3),
    **{name: (dict.fromkeys(files, b"{}"), ": no config.json in it; name a checkpoint, a file of weights, or a fol", 2)
       for name, files in (("nothing", []), ("no config", ["pytorch_model.bin"]), ("runs", ["a/config.json"]),
                           )},
    "a run": (dict.fromkeys(["latest.pt", "best_model.pt"], b""), ": no config.json in it; name .*/best_model.pt", 2),
    **{f"an index of {name}": ({"config.json": b"{}", "model.safetensors.index.json": content, "b": b""}, message, code)
       for name, content, message, code in (
           ("absent files", b'{"weight_map": {"x": "b", "y": "a.bin"}}', "a.bin: no such file$", 2),
           ("files elsewhere", b'{"weight_map": {"x": "../b"}}', "json: not the index of a model: Invalid name", 3),
           ("the folder above", b'{"weight_map": {"x": ".."}}', "/..: a folder, not a file|Invalid name", 2),
           ("no names", b'{"weight_map": {"x": [7]}}', "json: not the index of a model", 3),
           ("nothing", b'{}', "json: not the index of a model", 3),
           ("LFS", b"version https://git-lfs.github.com/spec/v1\n", "json: a pointer of git LFS.* git lfs pull", 3))},
    **{f"{name} without index": (dict.fromkeys(["config.json", *files], b"{}"), rf": {files[0]} and what is beside it "
                                 "are not all parts of one model, and no index.json names those; copy the whole", 3)
       for name, files in (
           ("a part", ["model-00002-of-00002.safetensors"]), ("bin", ["pytorch_model-00001-of-00002.bin"]),
           ("two saves", ["a-00001-of-00001.safetensors", "b-00002-of-00004.safetensors"]),
           ("two halves", ["a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"]),
           ("two models", ["a.safetensors", "b.safetensors"]))},
    "no weights": ({"config.json": b"{}"}, r"no .safetensors and no pytorch_model.bin", 2),
    "LLaMA": ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}, "model_type 'llama'; .*TRL", 3),
    **{f"another tokenizer, {name}": ({"config.json": b'{"n_head": 4}', "model.safetensors": b"", name: content},
                                      f"{name}: another tokenizer than GPT-2's; use a model trained on GPT-2's", 3)
       for name, content in (("vocab.json", b'{"\\u0120the": 2621}'), ("tokenizer.json", b'{"model": {"vocab": {}}}'))},
    "not JSON": ({"config.json": b"["}, "not readable as JSON", 2),
    "a list": ({"config.json": b"[]"}, "not readable as JSON: not an object", 2),
    "damaged": ({"config.json": b"{}", "model.safetensors": b"\xff" * 100}, "safetensors file.*; copy or download", 3),
    "llm.c": ({"config.json": b"{}", "pytorch_model.bin": struct.pack("<2i", 20240326, 3)}, "dev/eval/export_hf.py", 3),
    "GGUF": ({"config.json": b"{}", "pytorch_model.bin": b"GGUF\3\0\0\0"}, "a GGUF file; import the", 3),
    **{f"LFS {name}": ({"config.json": b"{}", name: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
                       f"{name}: a pointer of git LFS, .* run git lfs pull", 3)
       for name in ("model.safetensors", "pytorch_model.bin", "config.json")},
    **{name: ({"config.json": b"{}", "pytorch_model.bin": content}, "not a loadable checkpoint: no file of torch.save,"
              " or cut off; name another, or copy it again$", 3)
       for name, content in (("text", b"not a model\r\n" * 99), ("empty", b""), ("no text", b"\x89PNG\r\n\x1a\n\0"),
                             ("a cut zip", b"PK\3\4" + b"\0" * 99))},
}


@pytest.mark.parametrize("case", FILES)
def test_folders_that_cannot_be_taken_say_what_to_do(tmp_path, case):
    files, message, code = FILES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(tmp_path.name)}.*{message}[^\n]*$") as caught:
        open_any(tmp_path)
    assert caught.value.exit_code == code


def test_parts_of_two_models_are_never_one(tmp_path, reference):
    """What has the same names, a weight in two of them; and a part of a model is not taken for one."""
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    with pytest.raises(UserError, match=f"only a part of a model; name its folder: {tmp_path}$"):
        open_any(first)
    save_file({**load_file(second), **load_file(first)}, first)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: its files have some weights twice.*copy the whole model"):
        open_any(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "config.json"])
def test_a_pipe_or_a_device_is_one_line(tmp_path, name):
    """Reading it would wait for ever."""
    path = tmp_path / name
    os.mkfifo(path)
    for read in (tmp_path if name == "config.json" else path, Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"({name}|/dev/zero): .*a pipe or a device, not a file$"):
            open_any(read)
    for main, flag in ((chat.main, "--checkpoint"), (train_instruct.main, "--resume")):
        with pytest.raises(UserError, match="not a "):
            main([flag, str(path), "--device", "cpu"])


def test_a_damaged_file_from_before_zip_is_refused_or_loads_whole(tmp_path, weights):
    """It has no checksums: what is noticed is structure, shapes, and values that are not finite."""
    path = tmp_path / "a.pt"
    torch.save({"model": weights, "config": {"n_head": 4}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for end in (0, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="a.pt: "):
            open_any(path)


def test_the_trainer_takes_folders_and_heads_and_says_what_the_model_is(inputs, tmp_path, reference, capsys):
    reference.save_pretrained(tmp_path / "model")
    torch.save(reference.state_dict(), tmp_path / "bare.pt")
    usual = ["--max_steps", 1, "--context_length", 32]
    for source, flags in (("model", []), ("bare.pt", ["--n_head", 4])):
        assert train((inputs[0], tmp_path / source), tmp_path / f"from_{source}", *usual, *flags) == 0
        assert "2 layers of 4 heads, width 48, context_length 32, weights of " in capsys.readouterr().out
    with pytest.raises(UserError, match="how many heads .* --n_head N "):
        train((inputs[0], tmp_path / "bare.pt"), tmp_path, *usual)
    torch.save(with_output(small_model(config=PADDED).state_dict()), tmp_path / "padded.pt")
    assert train((inputs[0], tmp_path / "padded.pt"), tmp_path, *usual, "--n_head", 4) == 0
    assert "padded.pt, without the 47 rows after GPT-2's tokens" in capsys.readouterr().out


def test_another_vocabulary_is_refused_at_the_start(inputs, tmp_path):
    prepare(write_jsonl(tmp_path / "a.jsonl", map(row, range(20))), tmp_path / "data")
    with pytest.raises(CheckpointError, match="pretrained.pt: its vocabulary has 1,009 tokens, GPT-2's has 50,257"):
        train((tmp_path / "data", inputs[1]), tmp_path)
