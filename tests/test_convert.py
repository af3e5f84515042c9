"""Published weights come in exactly; anything that is not GPT-2 as published is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import convert_checkpoint
from conftest import run_script
from errors import CheckpointError, UserError
from helpers import same_state
from model import Documents
from weights.checkpoint import load, model_of
from weights.pretrained import load_folder, load_pretrained


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, GPT2LMHeadModel]:
    """A small GPT-2 saved by transformers, every parameter random."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("published") / "gpt2-tiny"
    model.save_pretrained(folder)
    return folder, model


def changed_copy(source: Path, target: Path, **changes: object) -> Path:
    target.mkdir()
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def import_to(output: Path, source: Path, *flags: str) -> int:
    return convert_checkpoint.main(["import", str(source), "--output", str(output), *flags])


def test_an_imported_folder_has_the_logits_of_transformers(published, tmp_path, capsys):
    folder, reference = published
    output = tmp_path / "checkpoints" / "best_model.pt"
    assert import_to(output, folder) == 0 and capsys.readouterr().out.startswith(f"wrote {output}: ")
    model = model_of(load(output), output, torch.device("cpu"))
    tokens = torch.randint(0, 300, (32,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens, Documents.of([32]))), reference(tokens[None]).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    assert same_state(load_pretrained(output)[1], dict(model.state_dict()))
    assert vars(load_pretrained(output)[0]) == vars(model.config) == {
        "context_length": 32, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 48}


def test_shards_and_16_bit_weights_are_read(published, tmp_path):
    folder, reference = published
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same_state(load_folder(tmp_path / "shards"), load_folder(folder))
    half = changed_copy(folder, tmp_path / "half")
    save_file({name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()},
              half / "model.safetensors")
    assert same_state(load_folder(half)[1], {k: value.half().float() for k, value in load_folder(folder)[1].items()})


@pytest.mark.parametrize("name, value, message", [
    *((name, value, "not a GPT-2 as published: ") for name, value in {
        "model_type": "llama", "activation_function": "relu", "tie_word_embeddings": False,
        "scale_attn_by_inverse_layer_idx": True, "n_inner": 96}.items()),
    ("n_layer", 2, "its config says "), ("vocab_size", 50257, "its config says "), ("n_head", 5, "not a multiple of "),
])
def test_what_is_not_gpt2_as_published_is_exit_code_3(published, tmp_path, name, value, message):
    with pytest.raises(CheckpointError, match=f"{message}{name} {value!r}"):
        import_to(tmp_path / "out.pt", changed_copy(published[0], tmp_path / "other", **{name: value}))
    assert not (tmp_path / "out.pt").exists()


def test_wrong_sources_are_one_line(published, tmp_path):
    folder, existing = published[0], tmp_path / "mine.pt"
    bare, damaged, not_json = (changed_copy(folder, tmp_path / name) for name in ("bare", "damaged", "not_json"))
    (bare / "model.safetensors").unlink()
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    (not_json / "config.json").write_text("[")
    existing.write_text("mine")
    for source, message, *output in [
            (tmp_path, "config.json: not readable"), (bare, "no .safetensors file"),
            (damaged, "not a readable safetensors file"), (not_json, "not readable as a model's configuration"),
            (folder / "config.json", "not a folder"), (folder, "exists; --force replaces it", existing)]:
        with pytest.raises(UserError, match=message) as caught:
            import_to(*output or [tmp_path / "out.pt"], source)
        assert caught.value.exit_code == (3 if source == damaged else 2) and "\n" not in str(caught.value)
    assert existing.read_text() == "mine"
    assert import_to(existing, folder, "--force") == 0 and load(existing)["step"] == 0


def test_without_a_network_the_hub_is_one_line(tmp_path):
    code, _, stderr = run_script("convert_checkpoint.py", "import", "gpt2", "--output", tmp_path / "out.pt",
                                 env={"HF_HOME": str(tmp_path)})
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: gpt2: no such folder, and fetching it from the Hugging Face hub failed")
