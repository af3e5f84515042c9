"""The matrix products of decoding on a CPU, where one token reads every weight once and reading is all the time.

Streamed computes what nn.Linear does, through a kernel that reads fp32 weights at the speed of memory; Int8 reads a
quarter of the bytes.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT


class Streamed(nn.Module):
    """A linear layer of fp32 weights (n_out, n_in) through oneDNN, which is near memory speed for one row, where the
    default kernel has half of it (torch 2.13)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8(nn.Module):
    """A linear layer of int8 weights, one scale a row (its largest magnitude is 127); inputs are rounded to bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1).div_(127).clamp_min_(1e-12).bfloat16()
        self.weight, self.scales, self.bias = _rounded(weight, scales), scales, bias

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        product = torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales).float()
        return product if self.bias is None else product.add_(self.bias)


def _rounded(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)


class Int8Output(Int8):
    """The output matrix in int8. Its scores come in bf16, too coarse to choose among the likeliest tokens, so those
    are computed again from the fp32 rows."""

    EXACT = 128

    def __init__(self, weight: Tensor, bias: None = None) -> None:
        super().__init__(weight, bias)
        self.exact = weight

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_embd) -> (n, vocab_size)."""
        scores = super().forward(x)
        likeliest = scores.topk(min(self.EXACT, scores.size(1)), sorted=False).indices
        return scores.scatter(1, likeliest, (self.exact[likeliest] @ x[:, :, None]).squeeze(2))


@torch.no_grad()
def for_decoding(model: GPT, form: type[Streamed] | type[Int8]) -> None:
    """Give the model's matrices this form, in place. It can be read with afterwards, not trained or saved."""
    for block in model.transformer.h:
        for part, name in [(block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")]:
            linear = getattr(part, name)
            setattr(part, name, form(linear.weight, linear.bias))
    model.output = (Int8Output if form is Int8 else form)(model.transformer.wte.weight, None)
