"""How much memory a run needs, and the micro-batch that fits a GPU."""

import os
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch

from model import GPT
from training.precision import TYPES, product_type
from training.processes import Processes

# Bytes for each token, layer and unit of width until the backward pass, as counted by PyTorch's allocator, for products
# of (two, four) bytes, by what is computed again there.
_KEPT = {"nothing": (40, 68), "gelu": (32, 54), "blocks": (9, 12)}
_ROOM = 0.9  # of what is free; the rest is for what the allocator cannot use
_OTHER = 700 << 20  # the scores of the output layer, and what a GPU, or PyTorch on a CPU, keeps for itself


def computer_memory() -> int:
    """Bytes of this computer's memory, or what a container may use of it."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def most_tokens(options: Namespace) -> int:
    """How many tokens a micro-batch may have."""
    return min(options.mini_batch_size * options.context_length, options.total_batch_size)  # type: ignore[no-any-return]


def needed_bytes(model: GPT, n_tokens: int, recompute: str, product_bytes: int) -> int:
    """For a step with micro-batches of n_tokens."""
    config, is_wide = model.config, product_bytes > 2
    # weights, gradients and two moments in fp32, and the copies that the products take
    fixed = sum(parameter.numel() for parameter in model.parameters()) * (16 if is_wide else 18)
    return fixed + n_tokens * config.n_layer * config.n_embd * _KEPT[recompute][is_wide] + _OTHER


def fit(options: Namespace, model: GPT, processes: Processes) -> tuple[Namespace, str]:
    """The options with what is chosen for these devices, the same on all ranks, and what is computed again in the
    backward pass (model.Transformer.recompute).

    precision becomes the type of the products, fp16 if one GPU has no bf16; a mini_batch_size of 0 the largest that
    fits the GPU with the least free memory (8 on a CPU). asked holds both as they were. Raises UserError on all ranks.
    """
    asked = {name: getattr(options, name) for name in ("precision", "mini_batch_size")}
    options = Namespace(**vars(options), asked=asked)
    with processes.together():
        found = product_type(options.precision, processes.device)
        options.precision = next(name for name, dtype in TYPES.items() if dtype is found)
    if "fp16" in processes.gather(options.precision):
        options.precision = "fp16"
    least = "blocks" if options.gradient_checkpointing == "on" else "gelu"
    if processes.device.type != "cuda":
        options.mini_batch_size = options.mini_batch_size or 8
        return options, least
    room = _ROOM * torch.cuda.mem_get_info(processes.device)[0]
    product_bytes = product_type(options.precision, processes.device).itemsize

    def fits(size: int, recompute: str) -> bool:
        n_tokens = min(size * options.context_length, options.total_batch_size)
        return needed_bytes(model, n_tokens, recompute, product_bytes) <= room

    if not options.mini_batch_size:
        most = options.total_batch_size // (options.context_length * processes.world_size)
        size = next((size for size in range(most, 1, -1) if fits(size, least)), 1)
        options.mini_batch_size = min(processes.gather(size))
    return options, "nothing" if least == "gelu" and fits(options.mini_batch_size, "nothing") else least
