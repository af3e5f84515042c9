"""A checkpoint or pre-trained model as one that can be asked: of our template or none, with GPT-2's vocabulary."""

from pathlib import Path
from typing import Any

import torch

from errors import CheckpointError
from instruct_format import TEMPLATE
from model import GPT
from weights.checkpoint import model_of
from weights.pretrained import check_vocabulary


def verified_model(state: dict[str, Any], path: Path, device: torch.device) -> GPT:
    """The model of a state that came from path. Raises CheckpointError when it does not fit, is of another template, or
    of another tokenizer."""
    if state["template"] not in (TEMPLATE, None):
        raise CheckpointError(f"{path}: fine-tuned with template {state['template']!r}, this version knows "
                              f"{TEMPLATE!r}")
    model = model_of(state, path, device)
    check_vocabulary(model.config.vocab_size, path)
    return model
