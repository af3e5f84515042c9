"""Where to compute, and with which type of number."""

from contextlib import AbstractContextManager, nullcontext

import torch

from errors import UserError


def device_named(name: str) -> str:
    """auto becomes cuda or cpu. Raises UserError when the named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: no such device here; --device cpu works everywhere")
    return name


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 for matrix products on GPUs that have it; fp32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
