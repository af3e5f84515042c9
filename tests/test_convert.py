"""The import command: published weights come in exactly, what cannot be had or used is one line."""

import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

import convert_checkpoint
from conftest import run_script
from errors import UserError
from helpers import same_state, small_model, transformers_model
from model import GPTConfig
from weights.checkpoint import load
from weights.pretrained import open_any


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, GPT2LMHeadModel]:
    """A small GPT-2 saved by transformers."""
    folder = tmp_path_factory.mktemp("published") / "gpt2-tiny"
    model = transformers_model(small_model(config=GPTConfig(32, 50257, 3, 4, 48)))
    model.save_pretrained(folder)
    return folder, model


def import_to(output: Path, source: Path | str, *flags: str) -> int:
    return convert_checkpoint.main(["import", str(source), "--output", str(output), *flags])


def test_a_file_is_imported_with_its_heads(published, tmp_path):
    folder, reference = published
    torch.save(reference.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="how many heads .* --n_head N "):
        import_to(tmp_path / "out.pt", tmp_path / "bare.pt")
    assert import_to(tmp_path / "out.pt", tmp_path / "bare.pt", "--n_head", "4") == 0
    assert import_to(tmp_path / "other.pt", folder / "model.safetensors") == 0  # config.json is beside it
    assert same_state(load(tmp_path / "out.pt"), load(tmp_path / "other.pt"))


def test_padding_is_left_out_once_for_all(published, tmp_path):
    """Training and evaluation would count its rows, chat and export do not know them."""
    weights = published[1].state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((47, 48), torch.nan)])
    torch.save({"model": weights, "config": {"n_head": 4, "vocab_size": 50304}}, tmp_path / "a.pt")
    assert import_to(tmp_path / "out.pt", tmp_path / "a.pt") == 0
    assert same_state(load(tmp_path / "out.pt"), open_any(published[0]))
    assert import_to(tmp_path / "again.pt", tmp_path / "out.pt") == 0
    assert same_state(load(tmp_path / "again.pt"), open_any(published[0]))


def test_an_output_that_exists_is_not_replaced(published, tmp_path, capsys):
    """With --force a foreign file gets another name, and what is no file stays as it is."""
    folder, existing = published[0], tmp_path / "mine.pt"
    existing.write_text("mine")
    with pytest.raises(UserError, match="mine.pt: exists; --force replaces it"):
        import_to(existing, folder)
    assert existing.read_text() == "mine"
    for is_foreign in (True, False):
        assert import_to(existing, folder, "--force") == 0 and load(existing)["step"] == 0
        assert (f"{existing} was there: now mine.abandoned1.pt\n" in capsys.readouterr().out) == is_foreign
    assert (tmp_path / "mine.abandoned1.pt").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    no_file = {str(path): "a .*, not a file" for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path())}
    no_name = {f"{tmp_path}/{name}": f"import writes a checkpoint; name it {tmp_path}/a.pt"
               for name in ("a.BIN", "a.gguf", "a")}  # what no command would take for a checkpoint
    for output, message in {**no_file, **no_name, f"{tmp_path}/{'a' * 300}": ".*too long"}.items():
        with pytest.raises(UserError, match=f"^{output}: {message}"):
            import_to(Path(output), folder, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.pt", "mine.abandoned1.pt", "pipe", "link"}


def test_without_a_network_the_hub_is_one_line(tmp_path):
    """The library's own words are for programmers. What cannot be a name of the hub is not asked for."""
    code, _, stderr = run_script("convert_checkpoint.py", "import", "gpt2", "--output", tmp_path / "out.pt",
                                 env={"HF_HOME": str(tmp_path)})
    assert (code, stderr) == (2, "error: gpt2: no such file or folder, and fetching it from the Hugging Face hub "
                                 "failed: check the network, or import a local file or folder\n")
    for source in ("no/such/folder", "/absent", "./gpt2", "gpt--2", "my model", "checkpoints/absent.pt", "~/gpt2"):
        with pytest.raises(UserError, match=f"^{source}: no such file or folder($|, and .* no public model of this )"):
            import_to(tmp_path / "out.pt", source)
