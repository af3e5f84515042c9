"""Linear layers on AMD CPUs with AVX-512, which MKL, PyTorch's choice for fp32, leaves unused there. oneDNN uses it,
and in bf16 it adds the bias in the same pass."""

from typing import Any

import torch
from torch import Tensor

from model import GPT, Linear
from processor import is_amd, linear_by_onednn, onednn_has_avx512

LEAST_WIDTH = 384  # of a model


def is_faster(weight: Tensor, product_type: torch.dtype) -> bool:
    """Whether oneDNN's products in a model of this output matrix are faster than what PyTorch chooses. (Sums over rows,
    as in the gradient of a matrix, are not; nor are small products, which it prepares for each number of rows.)"""
    return (weight.device.type == "cpu" and {weight.dtype, product_type} <= {torch.float32, torch.bfloat16}
            and weight.size(1) >= LEAST_WIDTH and is_amd() and onednn_has_avx512())


def multiply_with_onednn(model: GPT) -> None:
    """In all linear layers, for inputs with a gradient."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.multiply = _Multiply.apply


class _Multiply(torch.autograd.Function):
    """What F.linear computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return linear_by_onednn(gradient, weight.t()), torch.mm(gradient.t(), x), gradient.sum(0)
