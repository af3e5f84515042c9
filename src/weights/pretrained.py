"""Weights from elsewhere: a file of torch.save or a Hugging Face folder becomes our names, layout and fp32."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import CheckpointError, UserError, errors_at
from model import GPTConfig
from weights.checkpoint import FORMAT, check_weights, is_weight, load
from weights.safe_load import load_any

# What other trainers call the sizes of a model.
_NAMES = {"context_length": ("block_size", "n_positions", "n_ctx"), "n_layer": ("num_layers",),
          "n_head": ("num_heads",), "n_embd": ("embd_size",)}
# What a GPT-2 of transformers must be like to be the model that model.py computes.
_EXPECTED = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "n_inner": None,
             "layer_norm_epsilon": 1e-5}


def open_any(path: Path) -> dict[str, Any]:
    """The state of a checkpoint of ours, or the same fields for a pre-trained model: template None, no losses.

    Raises UserError when there is no such file, CheckpointError when it is damaged, unsafe, or no GPT-2.
    """
    if path.is_dir():
        config, weights = load_folder(path)
    elif load_any(path).get("format") == FORMAT:
        return load(path)
    else:
        config, weights = load_pretrained(path)
    return {"step": 0, "val_losses": [], "template": None, "multi_turn": False, "data_source": "",
            "model_config": vars(config), "model": weights}


def load_pretrained(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration and weights (our names, fp32) of a pre-trained GPT-2 in a file of torch.save.

    Takes a checkpoint of ours, a bare state dict, or {'model': ...} with a config dict or a pickled config dataclass.
    Raises UserError when there is no such file, CheckpointError when it is damaged, unsafe, or no GPT-2.
    """
    state = load_any(path)
    found = state.get("model", state)
    if not isinstance(found, Mapping) or not all(is_weight(*item) for item in found.items()):
        raise CheckpointError(f"{path}: no model weights in it (expected a state dict, or one under 'model')")
    weights = normalize_weights(found, path)
    sizes: object = next((state[key] for key in ("model_config", "model_args", "config") if key in state), {})
    return config_of(sizes, weights, path), weights


def load_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration and weights of a Hugging Face folder: config.json and one or more .safetensors files.

    Raises UserError when a file is missing or not readable, CheckpointError when it is no GPT-2 as published.
    """
    with errors_at(f"{folder}/config.json: not readable as a model's configuration", ValueError, AttributeError):
        sizes: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        wrong = [f"{key} {sizes[key]!r}" for key, value in _EXPECTED.items() if sizes.get(key, value) != value]
    if wrong:
        raise CheckpointError(f"{folder}: not a GPT-2 as published: {', '.join(wrong)}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file; save the model with save_pretrained(safe_serialization=True)")
    found: dict[str, Tensor] = {}
    for file in files:
        with errors_at(f"{file}: not a readable safetensors file", SafetensorError, raised=CheckpointError):
            found.update(load_file(file))
    weights = normalize_weights(found, folder)
    return config_of(sizes, weights, folder), weights


def normalize_weights(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring a GPT-2 state dict to our names, layout and fp32.

    Wrapper prefixes and causal-mask buffers go, the tied output matrix goes, Conv1D weights (published GPT-2) are
    transposed, biases that a model was trained without become zeros.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
        if name != "lm_head.weight" and not name.startswith("transformer."):
            name = "transformer." + name
        if not re.search(r"\.attn\.(masked_)?bias$", name):
            weights[name] = tensor.float()
    embedding, output = weights.get("transformer.wte.weight"), weights.pop("lm_head.weight", None)
    if embedding is None:
        raise CheckpointError(f"{path}: no GPT-2 (it has no transformer.wte.weight)")
    if output is not None and not torch.equal(output, embedding):
        raise CheckpointError(f"{path}: lm_head.weight is not the token embedding; GPT-2 ties them")
    first = weights.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.shape == (embedding.shape[1], 3 * embedding.shape[1]):
        for name in [name for name in weights if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)]:
            weights[name] = weights[name].t().contiguous()
    if not any(name.endswith(".bias") for name in weights):
        for name in [name for name in weights if ".ln_" in name or re.search(r"\.c_\w+\.weight$", name)]:
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(weights[name].shape[0])
    return weights


def config_of(sizes: object, weights: Mapping[str, Tensor], path: Path) -> GPTConfig:
    """The model's sizes: what the weights show, and the number of heads, which they do not (default n_embd / 64).

    sizes is a dict or an object with fields. Raises CheckpointError when they contradict the weights.
    """
    named = sizes if isinstance(sizes, dict) else vars(sizes)
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    shown = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": max(1, n_embd // 64),
             "context_length": weights.get("transformer.wpe.weight", torch.empty(0)).shape[0],
             "n_layer": len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})}
    for field in shown:
        value = next((named[name] for name in (field, *_NAMES.get(field, ())) if name in named), shown[field])
        if field != "n_head" and value != shown[field]:
            raise CheckpointError(f"{path}: its config says {field} {value}, its weights have {shown[field]}")
        shown[field] = value
    with errors_at(path, ValueError, raised=CheckpointError):
        config = GPTConfig(**shown)
    check_weights(config, weights, path)
    return config
