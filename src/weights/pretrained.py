"""Weights from elsewhere: a file or folder that holds a GPT-2 becomes our names, layout and fp32."""

import json
import re
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import CheckpointError, UserError, errors_at, python
from instruct_format import VOCAB_SIZE
from model import GPTConfig
from weights.checkpoint import FORMAT, FORMAT_VERSION, is_weight, verify
from weights.safe_load import begin_of, load_any

# Where the config.json of an exported folder says how the model was fine-tuned, and what holds for other models.
ABOUT, FINE_TUNED = "gpt2_instruct", {"template": None, "multi_turn": False, "data_source": ""}
# Under what name programs save the weights (else the file is the state dict itself), and mostly the model's sizes.
_WEIGHTS, _SIZES = ("model", "state_dict", "model_state_dict", "module"), ("model_config", "model_args", "config")
# What other trainers call the sizes.
_NAMES = {"context_length": ("block_size", "n_positions", "n_ctx"), "n_layer": ("num_layers", "n_layers"),
          "n_head": ("num_heads", "n_heads", "num_attention_heads"), "n_embd": ("embd_size",)}
_HEADS = {"n_head", *_NAMES["n_head"]}
_PUBLISHED_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # by (n_layer, n_embd)
_LARGEST_VOCABULARY = 51_200  # GPT-2's, padded to a multiple of 1,024
# What a GPT-2 of transformers may say and be the model that model.py computes. The activations are one function.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "activation_function": tuple(f"gelu_{name}" for name in ("new", "pytorch_tanh", "fast", "accurate", "python_tanh")),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps"), (1e-5, torch.tensor(1e-5).item()))}  # as GGUF has it

# What torch.compile, DDP, FSDP and checkpointing put into the names, of single blocks too
_WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_GPT2_WORD = re.compile(rb'"(\xc4\xa0|\\u0120)the"\s*:\s*262\b')  # in each file of GPT-2's tokenizer
_EMBEDDING, _OUTPUT = "transformer.wte.weight", "lm_head.weight"
_PART = re.compile(r"(.+-)\d{5}-of-(\d{5})(\.\w+)")  # model-00001-of-00002.safetensors
_OTHER = "; only GPT-2 as published can be fine-tuned here, for other models take another trainer, such as TRL"
_COPY = "copy the whole model again, into an empty folder"
_ADAPTER = ("a PEFT adapter, not a model; merge it first, model.merge_and_unload().save_pretrained(FOLDER), and import "
            "that folder")


def open_any(path: Path, n_head: int = 0) -> dict[str, Any]:
    """The state of a checkpoint of ours, or the same fields for a GPT-2 from elsewhere: a file of torch.save or
    safetensors, a Hugging Face folder. template is None unless this project exported it. n_head is for weights without
    a configuration, 0 when the user did not say it. Rows after GPT-2's vocabulary, padding or tokens that were added,
    are left out; left_out is their number. Whether all weights are there and fit, model_of checks. Raises UserError
    when there is no such file or the number of heads is not known, CheckpointError when it is damaged, unsafe, or no
    GPT-2."""
    part = _PART.fullmatch(path.name)
    if path.is_file() and (part and int(part[2]) > 1 or path.name.endswith(("config.json", ".index.json"))):
        raise UserError(f"{path}: only a part of a model; name its folder: {path.parent}")
    parts = list(map(_read_file, _files_of(path) if path.is_dir() else [path]))
    state = {name: value for part in parts for name, value in part.items()}
    if len(state) < sum(map(len, parts)):
        raise CheckpointError(f"{path}: its files have some weights twice, so they are of two models; {_COPY}")
    if state.get("format") == FORMAT:
        state = verify({**state, "left_out": 0}, path)
        if n_head and n_head != state["model_config"].get("n_head"):
            raise CheckpointError(f"{path}: it has {state['model_config'].get('n_head')} heads, not {n_head}")
        return state
    found: Any = next((each for each in map(state.get, _WEIGHTS) if isinstance(each, Mapping)
                       and any(isinstance(value, Tensor) for value in each.values())), state)
    if not isinstance(found, Mapping) or not all(is_weight(*item) for item in found.items()):
        raise CheckpointError(f"{path}: no model weights in it (expected a state dict, bare or under "
                              f"{', '.join(map(repr, _WEIGHTS))}; found {reprlib.repr(list(found))})")
    with errors_at(f"{path}: no GPT-2", LookupError, TypeError, ValueError, RuntimeError, raised=CheckpointError):
        weights = normalize_weights(found, path)
        check_vocabulary(rows := len(weights[_EMBEDDING]), path)
        named = next((state[key] for key in _SIZES if isinstance(state.get(key), Mapping)), {}) or _config_beside(path)
        if rows > VOCAB_SIZE:
            weights[_EMBEDDING] = weights[_EMBEDDING][:VOCAB_SIZE].clone()
            if named.get("vocab_size") == rows:
                named = {**named, "vocab_size": VOCAB_SIZE}
        config = config_of(named, weights, path, n_head, _mappings_in({**state, "beside": named}))
        tuned = {**FINE_TUNED, **named.get(ABOUT, {})}
    return verify({"format": FORMAT, "format_version": FORMAT_VERSION, "step": 0, "val_losses": [],
                   **{name: tuned[name] for name in FINE_TUNED}, "model_config": vars(config), "model": weights,
                   "left_out": rows - VOCAB_SIZE}, path)


def without_rows(count: int) -> str:
    """What is to be said of rows that were left out."""
    return f", without the {count:,} rows after GPT-2's tokens, padding or added tokens" * (count > 0)


def check_vocabulary(vocab_size: int, path: Path) -> None:
    """Raise CheckpointError unless this is the vocabulary of GPT-2's tokenizer, as it is or padded."""
    if not VOCAB_SIZE <= vocab_size <= _LARGEST_VOCABULARY:
        raise CheckpointError(
            f"{path}: its vocabulary has {vocab_size:,} tokens, GPT-2's has {VOCAB_SIZE:,} (padded: up to "
            f"{_LARGEST_VOCABULARY:,}), so it knows another tokenizer; use a model trained on GPT-2's tokens")


def _read_file(path: Path) -> dict[str, Any]:
    with errors_at(f"{path}: not a readable safetensors file", SafetensorError, raised=CheckpointError,
                   advice="; copy or download it again"):
        begins_so = begin_of(path)[8:9] == b"{"  # as its header does, whatever the name
        if begins_so or path.suffix.lower() == ".safetensors":
            return load_file(path)
    return load_any(path)


def _files_of(folder: Path) -> list[Path]:
    """The files of weights of a Hugging Face folder, as transformers chooses them: one, those that an index names, or
    without one all, which have to be the parts of one model."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: {_ADAPTER}")
    if any(folder.glob("*.ckpt*.index")):
        raise CheckpointError(f"{folder}: a TensorFlow checkpoint; first make a folder of it with transformers 4 "
                              "(convert_gpt2_original_tf_checkpoint_to_pytorch.py), then import that")
    if not (folder / "config.json").exists():
        example = min(folder.glob("*.pt"), default="a checkpoint, a file of weights, or a folder that has one")
        raise UserError(f"{folder}: no config.json in it; name {example}")
    _config_beside(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            with errors_at(f"{index}: not the index of a model", Exception, raised=CheckpointError):
                return sorted({index.with_name(part) for part in _json_of(index)["weight_map"].values()})
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: no .safetensors and no pytorch_model.bin in it; save the model with "
                        "save_pretrained()")
    part, kinds = _PART.fullmatch(files[0].name), {_PART.sub(r"\1\2\3", file.name) for file in files}
    if len(kinds) > 1 or part and len(files) < int(part[2]):
        raise CheckpointError(f"{folder}: {files[0].name} and what is beside it are not all parts of one model, and no "
                              f"index.json names those; {_COPY}")
    return files


def _json_of(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. Raises UserError when it cannot be read."""
    with errors_at(f"{path}: not readable as JSON", ValueError, RecursionError):
        begin_of(path)
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    return content


def _config_beside(path: Path) -> dict[str, Any]:
    """The config.json of a folder, or beside a file; empty where there is none. Raises UserError when it cannot be
    read, CheckpointError when it describes another kind of model, or what is beside it another tokenizer."""
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    sizes = _json_of(config) if config.exists() else {}
    if sizes.get("model_type", "gpt2") != "gpt2":
        raise CheckpointError(f"{path}: not a GPT-2 as published: model_type {sizes['model_type']!r:.60}{_OTHER}")
    for words in (folder / "vocab.json", folder / "tokenizer.json"):
        if sizes and words.is_file() and not _GPT2_WORD.search(words.read_bytes()):
            raise CheckpointError(f"{words}: another tokenizer than GPT-2's; use a model trained on GPT-2's tokens")
    return sizes


def _mappings_in(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """This and all that it holds, such as the fields of an object."""
    found, seen = [state], {id(state)}
    for value in found:
        for field in value.values():
            if isinstance(field, Mapping) and id(field) not in seen:  # it may hold itself
                seen.add(id(field))
                found.append(field)
    return found


def _in_our_names(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A GPT-2's state dict without prefixes and causal masks, in fp32. Its output matrix is lm_head.weight."""
    found = {_WRAPPERS.sub("", name): tensor for name, tensor in found.items() if not name.endswith("n_averaged")}
    prefix = next((name.removesuffix("wpe.weight") for name in found if re.search(r"(^|\.)wpe\.weight$", name)), None)
    output = next((name for name in found if re.search(rf"(^|\.){_OUTPUT}$", name)), "")
    if any(".lora_" in name for name in found):
        raise CheckpointError(f"{path}: {_ADAPTER}")
    if prefix is None or found.keys().isdisjoint((prefix + "wte.weight", output)):
        raise CheckpointError(f"{path}: no GPT-2 (no transformer.wte.weight and wpe.weight in it, found "
                              f"{', '.join(islice(found, 3))}){_OTHER}")
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if re.search(r"\.attn\.(masked_)?bias$", name):
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds values of type {tensor.dtype}, not weights")
        ours = _OUTPUT if name == output else re.sub(f"^{re.escape(prefix)}", "transformer.", name)
        weights[ours] = tensor.detach().float()
    return weights


def normalize_weights(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A GPT-2's state dict in our names, layout and fp32: without prefixes, causal masks and the tied output matrix,
    Conv1D weights (published GPT-2) transposed, biases that a model was trained without as zeros."""
    weights = _in_our_names(found, path)
    if (output := weights.pop(_OUTPUT, None)) is not None:
        embedding = weights.setdefault(_EMBEDDING, output)  # safetensors' save_model writes one of the two
        output, embedding = output[:VOCAB_SIZE], embedding[:VOCAB_SIZE]
        if not torch.equal(output, embedding) and embedding.sum().isfinite():  # NaN is not equal to itself
            raise CheckpointError(f"{path}: lm_head.weight is not the token embedding; it cannot be converted, train "
                                  "it again with the two tied, as in GPT-2")
    n_embd = weights[_EMBEDDING].shape[1]
    first = weights.get("transformer.h.0.attn.c_attn.weight", weights[_EMBEDDING])
    is_conv1d, has_biases = first.shape == (n_embd, 3 * n_embd), any(name.endswith(".bias") for name in weights)
    for name in list(weights):
        is_linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        if is_linear and is_conv1d:
            weights[name] = weights[name].t().contiguous()
        if not has_biases and (is_linear or ".ln_" in name):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(weights[name]))
    return weights


def config_of(named: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path, n_head: int = 0,
              others: Sequence[Mapping[str, Any]] = ()) -> GPTConfig:
    """The model's sizes: what the weights show, and the number of heads, which they do not. named is what the file or
    its config.json says, others is what else is said there, in any place. Raises CheckpointError when that contradicts
    the weights or n_head, or is not GPT-2 as published; UserError when nothing says the number of heads, or several
    are said, and the sizes are not published ones with these."""
    vocab_size, n_embd = weights[_EMBEDDING].shape
    shown = {"context_length": weights["transformer.wpe.weight"].shape[0], "vocab_size": vocab_size, "n_embd": n_embd,
             "n_layer": len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")}),
             "n_head": n_head}
    expected = {**_EXPECTED, "n_inner": (None, 4 * n_embd)}
    # what else may be the model's config, where named does not say the heads
    others = [each for each in others if _HEADS & each.keys() and not _HEADS & named.keys()]
    wrong = {f"{key} {each[key]!r:.60}": None for key, values in expected.items() for each in (named, *others)
             if key in each and each[key] not in values}
    if wrong:
        raise CheckpointError(f"{path}: not a GPT-2 as published: {', '.join(wrong)}{_OTHER}")
    heads = {each[name] for each in others for name in _HEADS & each.keys() if type(each[name]) is int}
    if n_head and heads and n_head not in heads:
        raise CheckpointError(f"{path}: it says {min(heads)} heads, not {n_head}; if another model in it has them, "
                              "save the state dict alone")
    if len(heads) == 1:
        named = {**named, "n_head": next(iter(heads))}
    for field, value in shown.items():
        name = next((name for name in (field, *_NAMES.get(field, ())) if name in named), field)
        if (said := named.get(name)) not in (None, value) and (field, value) != ("n_head", 0):
            raise CheckpointError(f"{path}: its config says {name} {said!r:.60}, not {value}")
        shown[field] = said or value
    published = _PUBLISHED_HEADS.get((shown["n_layer"], n_embd), 0)
    shown["n_head"] = shown["n_head"] or published * (not heads or published in heads)
    if not shown["n_head"]:
        raise UserError(f"{path}: nothing says clearly how many heads its {shown['n_layer']} layers of width {n_embd} "
                        f"have, and the weights do not show it; say it: {python()} src/convert_checkpoint.py import "
                        f"{shlex.quote(str(path))} --n_head N --output NEW.pt; then name NEW.pt")
    return GPTConfig(**shown)
