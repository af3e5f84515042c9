"""The matrix products of decoding on a CPU, where one token reads every weight once and reading is all the time.

Streamed computes what nn.Linear does, through a kernel that reads fp32 weights at the speed of memory; Int8 reads a
quarter of the bytes.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn as nn
from torch import Tensor

from cli import UserError
from model import GPT


class Streamed(nn.Module):
    """A linear layer of fp32 weights (n_out, n_in) through oneDNN, which is near memory speed for one row, where the
    default kernel has half of it (torch 2.13)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class Int8(nn.Module):
    """A linear layer of int8 weights, one scale a row (its largest magnitude is 127), through FBGEMM: it rounds the
    inputs of a call too, to 8 bits between their smallest and largest, and computes in integers."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        scales = weight.abs().amax(1).div_(127).clamp_min_(1e-12).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch moves quantized tensors to a package of their own, later
            rounded = torch.quantize_per_channel(weight, scales, torch.zeros_like(scales).long(), 0, torch.qint8)
            try:
                self.packed = torch.ops.quantized.linear_prepack(rounded, bias)
            except RuntimeError as error:  # PyTorch was built without integer products for this processor
                raise UserError(f"--quantize int8 does not work here ({str(error).splitlines()[0]}); leave it out"
                                ) from error
        # Without these instructions the products add up in 16 bits, and inputs of 7 bits keep them from overflowing.
        self.seven_bits = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        return torch.ops.quantized.linear_dynamic.default(x, self.packed, self.seven_bits)


class Int8Output(Int8):
    """The output matrix in int8. That is too coarse to choose among the likeliest tokens, so their scores are computed
    again from the fp32 rows."""

    EXACT = 128

    def __init__(self, weight: Tensor, bias: None = None) -> None:
        super().__init__(weight, bias)
        self.exact = weight

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_embd) -> (n, vocab_size)."""
        scores = super().forward(x)
        likeliest = scores.topk(min(self.EXACT, scores.size(1)), sorted=False).indices
        return scores.scatter_(1, likeliest, (self.exact[likeliest] @ x[:, :, None]).squeeze(2))


@torch.no_grad()
def for_decoding(model: GPT, form: type[Streamed] | type[Int8]) -> None:
    """Give the model's matrices this form, in place. It can be read with afterwards, not trained or saved."""
    for block in model.transformer.h:
        for part, name in [(block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")]:
            linear = getattr(part, name)
            setattr(part, name, form(linear.weight, linear.bias))
    model.output = (Int8Output if form is Int8 else form)(model.transformer.wte.weight, None)
