"""The matrix products of decoding on a CPU, where one token reads every weight once and reading is all the time."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT
from processor import is_amd, linear_by_onednn

# Before the first tensor: large pages, from which a CPU reads a tenth faster
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
WIDTH = 384  # outputs that are summed at a time: as many as the registers hold
BLOCK = 64  # rows
FEW_ROWS = 8  # the number that oneDNN arranges a matrix for; other numbers are about as fast


class Columns(nn.Module):
    """A linear layer for one row: its matrix is transposed, so that a product reads it in one piece, column after
    column. Several rows are as fast as in a linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach().t().clone(memory_format=torch.contiguous_format), bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        return torch.addmm(self.bias, x, self.weight)


class FewRows(nn.Module):
    """A linear layer in fp32 whose matrix is kept in the order in which oneDNN reads it: for eight rows about twice as
    fast as the matrix as it was."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), FEW_ROWS)
        self.bias = bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        return linear_by_onednn(x, self.weight, self.bias)


class Blocks(nn.Module):
    """A linear layer for one row: its matrix in blocks of rows, each a product of its own, which on CPUs of AMD reads
    nearly as fast as memory is. Several rows take the whole matrix."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        (self.n_out, n_in), n_blocks = weight.shape, -(-len(weight) // BLOCK)
        self.weight, self.bias = weight.new_zeros(n_blocks * BLOCK, n_in), bias.new_zeros(n_blocks * BLOCK)
        self.weight[:self.n_out], self.bias[:self.n_out] = weight.detach(), bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        if x.size(0) != 1:
            return linear_by_onednn(x, self.weight, self.bias)[:, :self.n_out]
        biases, blocks = self.bias.view(-1, BLOCK, 1), self.weight.view(-1, BLOCK, x.size(1))
        return torch.baddbmm(biases, blocks, x.t().expand(len(blocks), -1, 1)).view(1, -1)[:, :self.n_out]


OneRow: type[Columns | Blocks] = Blocks if is_amd() else Columns


class OneRowInt8(nn.Module):
    """A linear layer with weights of 8 bits for one row: a sum of the matrix's columns, weighted by the input, which is
    what embedding_bag computes, as fast as memory is read. Several rows take the matrix, which stays where it was.

    The table (n_parts, n_in, width) holds the columns, cut into parts so that every thread has as many to sum; its
    rows are bytes between the row's smallest and largest value.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.n_out, self.n_in = weight.shape
        self.weight, self.bias = weight.detach(), bias.detach()
        threads = torch.get_num_threads()
        n_parts = -(-self.n_out // (WIDTH * threads)) * threads
        width = -(-self.n_out // (n_parts * 16)) * 16  # whole vectors
        self.n_parts = -(-self.n_out // width)
        table = weight.new_zeros(self.n_parts, self.n_in, width)
        for part, rows in zip(table, self.weight.split(width)):
            part[:, :rows.size(0)] = rows.t()
        self.table = torch.ops.quantized.embedding_bag_byte_prepack(table.flatten(0, 1))
        self.rows = torch.arange(self.n_parts * self.n_in, dtype=torch.int32)  # all are summed
        self.begins = self.rows[::self.n_in].contiguous()  # of the parts

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in) -> (n, n_out)."""
        if x.size(0) != 1:
            return (linear_by_onednn if is_amd() else F.linear)(x, self.weight, self.bias)
        weights = torch.cat((x.view(-1),) * self.n_parts)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(
            self.table, self.rows, self.begins, False, 0, False, weights, None, False)
        return sums.view(1, -1)[:, :self.n_out].add_(self.bias)


@torch.no_grad()
def for_decoding(model: GPT, form: type[Columns | Blocks | FewRows | OneRowInt8]) -> None:
    """Give the model's matrices this form, in place (OneRow in place of FewRows, where oneDNN does not take them). It
    can be read with afterwards, not trained or saved. Nothing of it stays in the memory of the weights that it had,
    which may be a mapped file."""
    output = model.transformer.wte.weight
    if form is FewRows and not torch.backends.mkldnn.is_available():
        form = OneRow
    for name, module in list(model.named_modules()):
        if form is OneRowInt8 or not isinstance(module, nn.Linear):  # else the form is a copy
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
        if isinstance(module, nn.Linear):
            model.set_submodule(name, form(module.weight, module.bias))
    model.output = form(output, output.new_zeros(len(output)))
    if form is OneRowInt8:  # one after another, as large pages would hold only a part of each
        layers = [module for module in model.modules() if isinstance(module, OneRowInt8)]
        tables = torch.cat([layer.table.flatten() for layer in layers])
        for layer, table in zip(layers, tables.split([layer.table.numel() for layer in layers])):
            layer.table = table.view_as(layer.table)
