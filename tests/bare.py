"""Imported first: stand-ins for the packages that show and log a run, where they are not installed. What is run on a
machine with a GPU needs torch, numpy, tiktoken and safetensors only (and pytest)."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType


class Silent:
    """A bar or a writer that shows nothing."""

    def __init__(self, folder: str = "", **others: object) -> None:
        if folder:  # a writer's, which makes it
            Path(folder).mkdir(parents=True, exist_ok=True)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **others: None

    @staticmethod
    def external_write_mode(file: object) -> AbstractContextManager[None]:
        return nullcontext()


def stand_in(name: str, attribute: str) -> None:
    sys.modules[name] = ModuleType(name)
    setattr(sys.modules[name], attribute, Silent)


try:
    import tqdm  # noqa: F401
except ImportError:
    stand_in("tqdm", "tqdm")
try:
    import torch.utils.tensorboard  # noqa: F401
except ImportError:
    stand_in("torch.utils.tensorboard", "SummaryWriter")
