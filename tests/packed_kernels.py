"""The packed attention of GPUs, on CPUs: its operator and its gradient, a document at a time and in fp32. A program
that calls the operator can so be tested, and compiled, where there is no GPU."""

from typing import Any

import torch
import torch.nn.attention.varlen  # defines the operators
import torch.nn.functional as F
from torch import Tensor


def _each(starts: Tensor, *parts: Tensor) -> list[list[Tensor]]:
    """The documents of flat buffers (n_tokens, n_head, head_size), as (1, n_head, n_tokens, head_size) in fp32."""
    lengths = starts.diff().tolist()
    return [list(each) for each in zip(*(part.float().transpose(0, 1)[None].split(lengths, dim=2) for part in parts))]


def _flat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(torch.cat(parts, dim=2)[0].transpose(0, 1))


def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int,
             is_causal: bool = False, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert is_causal and torch.equal(starts, starts_k) and int(starts.diff().max()) <= longest == longest_k
    found = [F.scaled_dot_product_attention(*each, is_causal=True) for each in _each(starts, q, k, v)]
    return _flat(found, q), q.new_zeros(q.size(1), q.size(0), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
              *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for q1, k1, v1, wanted in _each(starts, q, k, v, gradient):  # by the formula: autograd has no part in here
        size = q1.size(-1)**-0.5
        hidden = torch.ones(q1.size(2), q1.size(2)).triu(1).bool()
        shares = (q1 @ k1.mT * size).masked_fill(hidden, -torch.inf).softmax(-1)
        of_shares = wanted @ v1.mT
        of_scores = size * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
        found.append((of_scores @ k1, of_scores.mT @ q1, shares.mT @ wanted))
    dq, dk, dv = (_flat(list(parts), like) for parts, like in zip(zip(*found), (q, k, v)))
    return dq, dk, dv


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _forward)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _backward)
