"""Data and weights from the hub: the real clients download from a stand-in of it on this machine."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import Outcome, run_script
from data_files import parquet, row
from helpers import texts_of
from hub import Hub, hub
from weights.checkpoint import load, model_of

DATASET, MODEL = "datasets/vicgalle/alpaca-gpt4", "models/openai-community/gpt2"
ROWS = [row(number, text="unused") for number in range(60)]


def from_hub(server: Hub, folder: Path, *command: str) -> Outcome:
    """A script whose clients know no other hub, keep what they download in the folder, and wait for a second."""
    return run_script(*command, cwd=folder, env={
        "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache"), "HF_TOKEN": "",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"})


def alpaca() -> dict[str, bytes]:
    return {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
            "data/train-00000-of-00001-6ef3991c06080e14.parquet": parquet(*ROWS)}


def test_the_default_dataset_comes_from_the_hub(tmp_path):
    """With no flag. The file lies on another server, whose first answer comes too late."""
    with hub({DATASET: alpaca()}) as server:
        server.faults["/cdn/"] = [2.0]
        code, stdout, stderr = from_hub(server, tmp_path, "prepare_instruct_dataset.py")
    assert code == 0 and "wrote data_instruct/dataset_info.json" in stdout, stderr
    texts = texts_of(tmp_path / "data_instruct")
    assert sorted(response for _, response in texts["train"] + texts["val"]) == sorted(row["output"] for row in ROWS)
    assert sum(method == "GET" and "/cdn/" in path for method, path, _, _ in server.requests) == 2
    assert json.loads((tmp_path / "data_instruct/dataset_info.json").read_bytes())["source"] == "vicgalle/alpaca-gpt4"


def test_gpt2_comes_from_the_hub(tmp_path):
    """Under its short name, which the hub redirects; the connection breaks in the middle of the file of 26 MB, and the
    client asks for the rest of it."""
    reference = GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=1, n_head=2, n_embd=128))
    weights = {key: value.contiguous() for key, value in reference.transformer.state_dict().items()}
    with hub({MODEL: {"config.json": reference.config.to_json_string().encode(), "README.md": b"gpt2",
                      "model.safetensors": save(weights), "pytorch_model.bin": b"not wanted" * 200}}) as server:
        server.faults["/cdn/"] = ["cut"]
        code, stdout, stderr = from_hub(server, tmp_path, "convert_checkpoint.py", "import", "gpt2")
    assert code == 0 and "1 layers of 2 heads, width 128" in stdout, stderr
    path = tmp_path / "checkpoints/best_model.pt"
    model = model_of(load(path), path)
    assert torch.equal(model.transformer.wte.weight, weights["wte.weight"])
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, weights["h.0.attn.c_attn.weight"].t())
    assert {status for _, _, status, _ in server.requests} >= {307, 302, 200, 206}
    assert any(wanted.startswith("bytes=") for _, _, _, wanted in server.requests)


@pytest.mark.parametrize("command, faults, code, reason", [
    ("prepare_instruct_dataset.py", {"/api/datasets/": [503] * 9}, 2, "Hugging Face hub failed: "),
    ("prepare_instruct_dataset.py", {"/cdn/": [403] * 9}, 2, "Hugging Face hub failed: "),
    ("prepare_instruct_dataset.py --dataset vicgalle/absent", {}, 2, "Hugging Face hub failed: "),
    ("convert_checkpoint.py import gpt2", {"/resolve/": [403] * 9}, 2, "Hugging Face hub failed: "),
    ("convert_checkpoint.py import me/nanogpt", {}, 2, "error: me/nanogpt: no weights for transformers in it, on the"),
    ("convert_checkpoint.py import me/lora", {}, 3, "a PEFT adapter, not a model; merge it first")])
def test_an_error_of_the_hub_is_one_line(tmp_path, command, faults, code, reason):
    with hub({DATASET: alpaca(), MODEL: {"config.json": b"{}"},
              "models/me/nanogpt": {"ckpt.pt": b"", "config.json": b"{}"},
              "models/me/lora": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}}) as server:
        server.faults |= faults
        found = from_hub(server, tmp_path, *command.split())
    assert (found.code, found.stdout.strip(), found.stderr.strip().count("\n")) == (code, "", 0), found.stderr
    assert reason in found.stderr and server.requests
    assert not [*tmp_path.glob("checkpoints/*"), *tmp_path.glob("data_instruct/*/*"), *tmp_path.glob("*/*.json")]
