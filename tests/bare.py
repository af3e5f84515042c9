"""Imported first: stand-ins for the packages that show and log a run, where they are not installed. What is run on a
machine with a GPU needs torch, numpy, tiktoken and safetensors only (and pytest)."""

import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock


def writer(folder: str, **others: object) -> MagicMock:
    """It makes its folder, and writes nothing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return MagicMock()


if not find_spec("tqdm"):
    sys.modules["tqdm"] = MagicMock()
if not find_spec("tensorboard"):
    sys.modules["torch.utils.tensorboard"] = MagicMock(SummaryWriter=writer)
