"""Published weights come in exactly; anything that is not GPT-2 as published is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import convert_checkpoint
from checkpoint import load, load_pretrained, model_of
from cli import CheckpointError, UserError
from conftest import run_script
from model import Documents


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, GPT2LMHeadModel]:
    """A small GPT-2 saved by transformers, every parameter random."""
    folder = tmp_path_factory.mktemp("published") / "gpt2-tiny"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=3, n_head=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return folder, model


def changed_copy(source: Path, target: Path, **changes: object) -> Path:
    """The folder with other values in its config.json."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_an_imported_folder_has_the_logits_of_transformers(published, tmp_path):
    folder, reference = published
    output = tmp_path / "checkpoints" / "best_model.pt"
    code, stdout, stderr = run_script("convert_checkpoint.py", "import", folder, "--output", output)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(f"wrote {output}: ")
    model = model_of(load(output), output, torch.device("cpu"))
    tokens = torch.randint(0, 300, (32,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens, Documents.of([32]))), reference(tokens[None]).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    config, weights = load_pretrained(output)
    assert (config.n_layer, config.n_head, config.n_embd) == (3, 4, 48)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_shards_and_16_bit_weights_are_read(published, tmp_path):
    folder, reference = published
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    _, found = convert_checkpoint.read_folder(tmp_path / "shards")
    _, whole = convert_checkpoint.read_folder(folder)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    half = changed_copy(folder, tmp_path / "half")
    save_file({name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()},
              half / "model.safetensors")
    convert_checkpoint.import_weights(str(half), tmp_path / "half.pt", force=False)
    _, weights = load_pretrained(tmp_path / "half.pt")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"activation_function": "relu"}, "activation_function 'relu'"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"n_inner": 96}, "n_inner 96"),
    ({"n_layer": 2}, "its config says n_layer 2, its weights have 3"),
    ({"n_head": 5}, "not a multiple of n_head 5"),
    ({"vocab_size": 50257}, "its config says vocab_size 50257"),
])
def test_what_is_not_gpt2_as_published_is_exit_code_3(published, tmp_path, changes, message):
    folder = changed_copy(published[0], tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint.import_weights(str(folder), tmp_path / "out.pt", force=False)
    assert not (tmp_path / "out.pt").exists()


def test_wrong_sources_are_one_line(published, tmp_path):
    folder, _ = published
    empty = tmp_path / "empty"
    empty.mkdir()
    without_weights = changed_copy(folder, tmp_path / "bare")
    (without_weights / "model.safetensors").unlink()
    damaged = changed_copy(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    not_json = changed_copy(folder, tmp_path / "not_json")
    (not_json / "config.json").write_text("[")
    existing = tmp_path / "mine.pt"
    existing.write_text("mine")
    for source, output, message, kind in [
            (empty, "out.pt", "config.json: not readable", UserError),
            (without_weights, "out.pt", "no .safetensors file", UserError),
            (damaged, "out.pt", "not a readable safetensors file", CheckpointError),
            (not_json, "out.pt", "not readable as a model's configuration", UserError),
            (folder / "config.json", "out.pt", "not a folder", UserError),
            (folder, existing.name, "exists; --force replaces it", UserError)]:
        with pytest.raises(kind, match=message):
            convert_checkpoint.import_weights(str(source), tmp_path / output, force=False)
    assert existing.read_text() == "mine"
    convert_checkpoint.import_weights(str(folder), existing, force=True)
    assert load(existing)["step"] == 0


def test_without_a_network_the_hub_is_one_line(tmp_path):
    code, _, stderr = run_script("convert_checkpoint.py", "import", "gpt2", "--output", tmp_path / "out.pt",
                                 env={"HF_HOME": str(tmp_path)})
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: gpt2: no such folder, and fetching it from the Hugging Face hub failed")
