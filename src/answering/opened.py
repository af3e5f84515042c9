"""A checkpoint or pre-trained model as one that can be asked: of our template or none, with GPT-2's vocabulary."""

from pathlib import Path
from typing import Any

import torch

from answering.decode_weights import FewRows, OneRow, OneRowInt8, for_decoding
from errors import CheckpointError, UserError
from instruct_format import TEMPLATE
from model import GPT
from weights.checkpoint import model_of
from weights.pretrained import check_vocabulary, open_any


def open_model(path: Path) -> tuple[GPT, dict[str, Any]]:
    """A model on the CPU, whose weights may be a mapped file, and the state that it came from. Raises UserError when
    path is something else, CheckpointError when it is damaged, does not fit, or is of another template or tokenizer."""
    state = open_any(path)
    if state["template"] not in (TEMPLATE, None):
        raise CheckpointError(f"{path}: fine-tuned with template {state['template']!r:.60}, this version knows "
                              f"{TEMPLATE!r}")
    model = model_of(state, path)
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
