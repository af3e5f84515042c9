"""How much memory of a GPU a run needs, and the micro-batch that fits."""

from argparse import Namespace

import torch

from model import GPT
from training.precision import product_type
from training.processes import Processes

# Bytes for each token, layer and unit of width until the backward pass, as counted by PyTorch's allocator, for products
# of (two, four) bytes, by what is computed again there.
_KEPT = {"nothing": (40, 68), "gelu": (32, 54), "blocks": (9, 12)}
_ROOM = 0.9  # of what is free; the rest is for what the allocator cannot use
_OTHER = 700 << 20  # the scores of the output layer, and what a GPU keeps for itself


def needed_bytes(model: GPT, n_tokens: int, recompute: str, product_bytes: int) -> int:
    """For a step with micro-batches of n_tokens."""
    config, is_wide = model.config, product_bytes > 2
    # weights, gradients and two moments in fp32, and the copies that the products take
    fixed = sum(parameter.numel() for parameter in model.parameters()) * (16 if is_wide else 18)
    return fixed + n_tokens * config.n_layer * config.n_embd * _KEPT[recompute][is_wide] + _OTHER


def fit(options: Namespace, model: GPT, processes: Processes) -> tuple[int, str]:
    """mini_batch_size, or where it is 0 the largest that fits the GPU that has the least free memory (8 on a CPU), and
    what is computed again in the backward pass (model.Transformer.recompute)."""
    is_checkpointed, is_cuda = options.gradient_checkpointing == "on", processes.device.type == "cuda"
    room = int(_ROOM * torch.cuda.mem_get_info(processes.device)[0]) if is_cuda else 0
    product_bytes = product_type(options.precision, processes.device).itemsize

    def fits(size: int, recompute: str) -> bool:
        return needed_bytes(model, size * options.context_length, recompute, product_bytes) <= room

    size = options.mini_batch_size
    if not size:
        most = max(1, options.total_batch_size // (options.context_length * processes.world_size)) if is_cuda else 8
        least = "blocks" if is_checkpointed else "gelu"
        size = next((size for size in range(most, 1, -1) if not is_cuda or fits(size, least)), 1)
        [size] = (-largest for largest in processes.largest(-size))
    return size, "blocks" if is_checkpointed else "nothing" if is_cuda and fits(size, "nothing") else "gelu"
