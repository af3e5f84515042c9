"""A checkpoint or pre-trained model as one that can be asked: of our template or none, with GPT-2's vocabulary."""

from pathlib import Path
from typing import Any

import torch

from answering.decode_weights import FewRows, OneRow, OneRowInt8, for_decoding
from errors import CheckpointError, UserError
from instruct_format import TEMPLATE
from model import GPT
from weights.checkpoint import BEST, model_of
from weights.pretrained import check_vocabulary, models_in, open_any

# What people name in place of a model, by its suffix: what reads it.
_READERS = {**dict.fromkeys((".json", ".jsonl", ".ndjson"), "./chat.sh CHECKPOINT --jsonl < "),
            ".txt": "./chat.sh CHECKPOINT < ",
            **dict.fromkeys((".csv", ".tsv", ".parquet", ".gz"), "python src/prepare_instruct_dataset.py --dataset ")}
_OF_MODELS = ("config.json", ".pt", ".safetensors", ".bin", ".index")  # what a folder has that is one, or nearly


def open_model(path: Path) -> tuple[GPT, dict[str, Any]]:
    """A model on the CPU, whose weights may be a mapped file, and the state that it came from. Raises UserError when
    path is something else, CheckpointError when it is damaged, does not fit, or is of another template or tokenizer."""
    if path.suffix.lower() in _READERS and path.is_file():
        raise UserError(f"{path}: not a model; name a checkpoint; this is for: {_READERS[path.suffix.lower()]}{path}")
    names = [file.name for file in path.iterdir()] if path.is_dir() else ["config.json"]
    if (is_data := "dataset_info.json" in names) or not any(name.endswith(_OF_MODELS) for name in names):
        inside = [*models_in(path), Path("checkpoints_instruct", BEST)]
        raise UserError(f"{path}: {'prepared data' if is_data else 'a folder without a model'}; name a checkpoint, "
                        f"such as {inside[0]}")
    state = open_any(path)
    if state["template"] not in (TEMPLATE, None):
        raise CheckpointError(f"{path}: fine-tuned with template {state['template']!r:.60}, this version knows "
                              f"{TEMPLATE!r}")
    model = model_of(state, path, torch.device("cpu"))
    check_vocabulary(model.config.vocab_size, path)
    return model, state


def open_for_answers(path: Path, device: torch.device, quantize: str | None = None,
                     together: bool = False) -> tuple[GPT, dict[str, Any]]:
    """The same on a device, ready to answer one question at a time, or several together. Raises UserError too when that
    device does not quantize."""
    if quantize and device.type != "cpu":
        raise UserError(f"--quantize int8 is for CPUs, not for {device.type}; leave it out, or add --device cpu")
    model, state = open_model(path)
    model.to(device)
    if device.type == "cpu":
        for_decoding(model, OneRowInt8 if quantize else FewRows if together else OneRow)
    return model, state
