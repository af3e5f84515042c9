"""Where to compute, and with which type of number."""

import os
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from errors import UserError


def device_named(name: str) -> str:
    """auto becomes cuda or cpu. Raises UserError when the named device is not there, or a GPU is and PyTorch cannot use
    it."""
    if name in ("auto", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is said below, in one line
            if torch.cuda.is_available():
                return "cuda"
        if _sees_a_gpu():
            reason = f"its driver does not work, or is too old for CUDA {torch.version.cuda}"
            if torch.version.cuda is None:
                reason = "this is the build for CPUs; install the one for CUDA in its place"
            raise UserError(f"--device {name}: there is an NVIDIA GPU, and PyTorch {torch.__version__} cannot use it: "
                            f"{reason}; --device cpu goes on without the GPU")
    if name == "auto":
        return "cpu"
    if name == "cuda" or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: no such device here; --device cpu works everywhere")
    return name


def _sees_a_gpu() -> bool:
    """Whether there is an NVIDIA GPU that nobody has hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 for matrix products on GPUs that have it; fp32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
