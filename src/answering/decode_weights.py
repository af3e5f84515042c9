"""The matrix products of decoding on a CPU, where one token reads every weight once and reading is all the time."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT

WIDTH = 384  # outputs that are summed at a time: as many as the registers hold


@lru_cache
def _bags(n_parts: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Which rows of a table are summed: (n_parts * n_in,) all of them; (n_parts,) where each part begins."""
    rows = torch.arange(n_parts * n_in, dtype=torch.int32)
    return rows, rows[::n_in].contiguous()


class OneRow(nn.Module):
    """A linear layer that is fast for one row: a sum of the matrix's columns, weighted by the input, which is what
    embedding_bag computes, as fast as memory is read, where matrix products need half as long again (torch 2.13).

    The table (n_parts, n_in, width) holds the columns, cut into parts so that every thread has as many to sum; its
    rows are fp32, or bytes between the row's smallest and largest value. Several rows, a prompt, take the matrix.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.int8 = weight.detach(), None if bias is None else bias.detach(), int8
        self.n_out, self.n_in = weight.shape
        threads = torch.get_num_threads()
        self.n_parts = -(-self.n_out // (WIDTH * threads)) * threads
        width = -(-self.n_out // (self.n_parts * 16)) * 16  # whole vectors
        self.n_parts = -(-self.n_out // width)
        table = weight.new_zeros(self.n_parts, self.n_in, width)
        for part, rows in zip(table, weight.split(width)):
            part[:, :rows.size(0)] = rows.t()
        table = table.flatten(0, 1)
        self.table = torch.ops.quantized.embedding_bag_byte_prepack(table) if int8 else table

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        if x.size(0) != 1:
            return _product(x, self.weight, self.bias)
        rows, begins = _bags(self.n_parts, self.n_in)
        weights = torch.cat((x.view(-1),) * self.n_parts)
        if self.int8:
            sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(
                self.table, rows, begins, False, 0, False, weights, None, False)
        else:
            sums = torch.ops.aten._embedding_bag_forward_only.default(
                self.table, rows, begins, False, 0, False, weights, False)[0]
        found = sums.view(1, -1)[:, :self.n_out]
        return found if self.bias is None else found.add_(self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What nn.Linear computes; for a short prompt oneDNN needs half as long as the default (torch 2.13)."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@torch.no_grad()
def for_decoding(model: GPT, int8: bool) -> None:
    """Give the model's matrices this form, in place. It can be read with afterwards, not trained or saved."""
    for block in model.transformer.h:
        for part, name in [(block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")]:
            linear = getattr(part, name)
            setattr(part, name, OneRow(linear.weight, linear.bias, int8))
    model.output = OneRow(model.transformer.wte.weight, None, int8)
