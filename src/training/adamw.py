"""The optimizer."""

import inspect

import torch

from model import GPT


class AdamW(torch.optim.AdamW):
    """PyTorch's own, fused where it can be, without the decorators that import its compiler: a second of each start on
    a CPU."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, model: GPT, weight_decay: float) -> None:
        """Betas (0.9, 0.95), with decay on matrices only."""
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                         betas=(0.9, 0.95), fused=matrices[0].device.type in ("cuda", "cpu"))
