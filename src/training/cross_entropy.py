"""Cross entropy of the output layer without its table of scores: (n, vocab_size) is far too large to keep.

The gradient of the scores, softmax minus one at the target, is known as soon as they are. So a chunk of rows is turned
into its loss and its part of both gradients at once, and its scores are forgotten. Chunks of a smaller type may be
longer: each adds its gradient of the whole matrix to one in fp32.
"""

import torch
from torch import Tensor

ROWS = 512  # whose scores exist at a time, 100 MB in fp32 for GPT-2's vocabulary; with a copy twice as many, or more
CPU_ROWS = 32  # whose scores are made into gradients at a time: 6 MB stay near the processor
COLUMNS = 2048  # of the scores, which a CPU computes at a time
_MULTIPLE = 64  # rows whose lengths are no multiples of this leave the fast kernels of GPUs, and of CPUs in fp32

# MKL, which computes exp on CPUs, chooses its kernel at the first call. Threads that make that call together may get
# one that is right to four digits only (issue 188792 of PyTorch; MKL before 2025), so a process makes it here.
torch.zeros(1).exp()


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the output matrix (vocab_size, n_embd) in a smaller type, with rows of zeros up to a multiple of 64."""
    copy = weight.new_zeros(len(weight) + -len(weight) % _MULTIPLE, weight.size(1), dtype=dtype)
    copy_again(weight, copy)
    return copy


@torch.no_grad()
def copy_again(weight: Tensor, copy: Tensor) -> None:
    """Bring a copy up to date. It lacks the mean row, which shifts all scores of a token alike and so changes no
    probability: what is left is rounded less. The scores of the published weights lie around -100."""
    torch.sub(weight, weight.mean(0), out=copy[:len(weight)])


@torch.no_grad()
def output_loss(hidden: Tensor, weight: Tensor, targets: Tensor, copy: Tensor | None = None,
                gradient: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """The sum of -log softmax(hidden @ weight.T)[target], in nats, and with gradient the gradient of scale times it.

    hidden (n, n_embd), weight (vocab_size, n_embd), targets (n,) int64; copy, from padded(), takes weight's place in
    the products, which are then in its type. gradient (vocab_size, n_embd) grows by that of weight. Returns the loss, a
    scalar of weight's type, and the gradient of hidden, or None.
    """
    matrix, is_exact = weight if copy is None else copy, copy is not None and hidden.is_cuda
    rows, piece_rows = ROWS * (6 if is_exact else 1 if copy is None else 2), 2 * ROWS if hidden.is_cuda else CPU_ROWS
    inputs, n_rows = hidden.to(matrix.dtype), min(rows, len(hidden))
    width, gap = (COLUMNS, -len(matrix) % _MULTIPLE) if hidden.device.type == "cpu" else (len(matrix), 0)
    scores = matrix.new_empty(n_rows, len(matrix) + gap)[:, :len(matrix)]
    exact = scores if copy is None else weight.new_empty(min(piece_rows, n_rows), len(matrix))
    losses, of_hidden = weight.new_empty(len(inputs)), None if gradient is None else torch.empty_like(inputs)
    for begin in range(0, len(inputs), rows):
        some = slice(begin, begin + rows)
        chunk = scores[:len(inputs[some])]
        if not is_exact:
            for part, words in zip(chunk.split(width, 1), matrix.split(width)):
                torch.mm(inputs[some], words.t(), out=part)
        parts = (chunk, inputs[some], targets[some, None], losses[some, None])
        for piece, states, wanted, loss in zip(*(part.split(piece_rows) for part in parts)):
            wide = piece if copy is None else exact[:len(piece)]
            if is_exact:  # products of small types come out in fp32 on a GPU
                torch.mm(states, matrix.t(), out_dtype=wide.dtype, out=wide)
            elif copy is not None:
                wide.copy_(piece)
            wide[:, len(weight):] = -torch.inf
            loss.copy_(_to_gradient(wide, wanted, piece))
        if gradient is not None and of_hidden is not None:
            torch.mm(chunk, matrix, out=of_hidden[some])
            _add_product(gradient, chunk[:, :len(weight)].t(), inputs[some], scale)
    return losses.sum(), None if of_hidden is None else of_hidden.to(hidden.dtype).mul_(scale)


def _to_gradient(scores: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """Put the gradient of the loss in gradient, which may be the scores (rows, vocab_size), which are overwritten.
    targets (rows, 1). Returns the loss of each row, (rows, 1)."""
    if scores.is_cuda:  # with few passes over them
        torch.log_softmax(scores, 1, out=scores)
        wanted = scores.gather(1, targets)
        torch.exp(scores, out=gradient)
        gradient.scatter_(1, targets, wanted.expm1().to(gradient.dtype))
        return -wanted
    # on a CPU these are more exact than the kernel above
    wanted, largest = scores.gather(1, targets), scores.amax(1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(1, keepdim=True)
    scores.scatter_add_(1, targets, -total)
    gradient.copy_(scores.mul_(1 / total))
    return largest + total.log() - wanted


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale * a @ b in the type of total, which may be wider than theirs."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, a, b, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        for part, rows in zip(total.split(2048), a.split(2048)):  # pieces, as their products need room of their own
            part.add_(torch.mm(rows, b), alpha=scale)
