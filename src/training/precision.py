"""Where to compute, and with which type of number."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from errors import UserError
from model import GPT, Linear
from training.cross_entropy import copy_again, padded
from training.onednn import is_faster, multiply_with_onednn

_NO_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED|NOT_INITIALIZED.*cublasCreate")
_UNUSABLE = re.compile("CUDA-capable device.* busy or unavailable|invalid device ordinal")
_REASON = re.compile(r"found version \d+|Error \d+: [^(]+")  # in the warning of a GPU that is not there
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_named(name: str) -> str:
    """auto becomes cuda or cpu. Raises UserError when the named device is not there, or a GPU is and PyTorch cannot use
    it."""
    if name in ("auto", "cuda"):
        with warnings.catch_warnings(record=True) as said:  # which is shown below, in one line
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.set_float32_matmul_precision("highest")  # fp32 is fp32, whatever the environment says
                # cuDNN, which PyTorch 2.15 prefers on an H100, prepares itself anew for each shape
                torch.backends.cuda.enable_cudnn_sdp(False)
                return "cuda"
        if _sees_a_gpu():
            found = _REASON.search(" ".join(str(each.message) for each in said))
            reason = (f"its driver does not work, or is too old for CUDA {torch.version.cuda}"
                      + (f" ({found[0].strip()})" if found else "")
                      + "; update it, or install a build for an older CUDA (the README says how, under Two commands)")
            if torch.version.cuda is None:
                reason = "this is the build for CPUs; install the one for CUDA in its place"
            elif not said and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
                reason = (f"CUDA_VISIBLE_DEVICES is {visible}, which may name none of its GPUs, or its driver does not "
                          "work (nvidia-smi -L lists them)")
            raise UserError(f"--device {name}: there is an NVIDIA GPU, and PyTorch {torch.__version__} cannot use it: "
                            f"{reason}; --device cpu goes on without the GPU")
    if name == "auto":
        return "cpu"
    if name == "cuda" or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: no such device here; --device cpu works everywhere")
    return name


def _sees_a_gpu() -> bool:
    """Whether there is an NVIDIA GPU that nobody has hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip().lower() in ("", "-1", "none", "void", "nodevfiles")
    return not hidden and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None)


def product_type(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products. auto: bf16 on GPUs that have it, fp16 on older ones, fp32 elsewhere. Raises
    UserError where the named one does not work."""
    is_new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if is_new else "fp16"
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 is for GPUs, this is {device.type}; take bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not is_new:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} does not have it; take fp16 or fp32")
    return TYPES[name]


def name_of(device: torch.device) -> str:
    """cpu, or a GPU with its name and memory."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB"


@contextmanager
def failures_explained(device: torch.device, advice: str = "") -> Iterator[None]:
    """What a device refuses in here becomes a UserError: memory that ran out with this advice; a GPU that another
    program holds, or for which this PyTorch has no kernels, with what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            advice = advice or "free some of it" + ", or add --device cpu" * (device.type != "cpu")
            raise UserError(f"out of memory on {device}: {advice}") from error
        if "no kernel image" in text:
            raise UserError(f"PyTorch {torch.__version__} has no kernels for {name_of(device)}; install a build for an "
                            "older CUDA, such as 12.6 (an RTX 50 or B200 needs 12.8 or newer), or "
                            "add --device cpu") from error
        if match := _UNUSABLE.search(text):
            raise UserError(f"{device}: {match.group()}: another program may hold it, or CUDA_VISIBLE_DEVICES name one "
                            "that is not there (nvidia-smi lists them); or add --device cpu") from error
        raise


def waits_for_disk(device: torch.device) -> bool:
    """Whether a save would leave an expensive device idle, so that a copy is written while it goes on."""
    return device.type == "cuda"


class Products:
    """The model that computes, with its products in this type. In fp32 it is the model itself; else its layers multiply
    copies of their weights, which are made once a step.

    Everything else is the model's own in any type: norms, embeddings, and the sum that flows from layer to layer, in
    fp32. copies: a parameter of the model -> its copy; output is the copy of the output matrix, None in fp32.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.model = model
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self.output: Tensor | None = None
        if is_faster(model.transformer.wte.weight, dtype):
            multiply_with_onednn(model)
        if dtype is torch.float32:
            return
        self.copies = {parameter: nn.Parameter(parameter.detach().to(dtype)) for module in model.modules()
                       if isinstance(module, Linear) for parameter in module.parameters()}
        memo = {id(each): self.copies.get(each, each) for each in model.parameters()}
        self.model = deepcopy(model, memo)  # which takes from memo what is in there
        self.output = padded(model.transformer.wte.weight, dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now."""
        if self.output is not None:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            copy_again(self.model.transformer.wte.weight, self.output)
