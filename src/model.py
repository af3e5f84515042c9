"""GPT-2: configuration, attention over packed documents, attention with a key/value cache, logits.

Parameter names are those of the published checkpoints (transformer.wte, transformer.h.N.attn.c_attn, ...). The output
matrix is the token embedding itself, so it has no parameter of its own. No loss, no files, no optimizer in here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# layer, its queries, keys and values (n_tokens, 3, n_head, head_size) -> attended values (n_tokens, n_head, head_size)
Attend = Callable[[int, Tensor], Tensor]

gelu = partial(F.gelu, approximate="tanh")  # the form of GPT-2
# of what is called so, only the inputs are kept for the backward pass
again_in_backward = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are the published 124M model."""

    context_length: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        """Raise ValueError where no such model can exist."""
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flat buffer lie. Positions and isolation both follow from it.

    lengths (3, 2) describe a buffer of five tokens:  a0 a1 a2 b0 b1
        positions                                      0  1  2  0  1
        starts                                         0        3     5
    and b1 attends to b0 and b1 only.
    """

    lengths: tuple[int, ...]
    positions: Tensor  # (n_tokens,) int64
    starts: Tensor  # (n_documents + 1,) int32, the end of the buffer included
    longest: int  # no document has more tokens

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu", longest: int = 0) -> "Documents":
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        positions = torch.arange(int(starts[-1])) - starts[:-1].long().repeat_interleave(torch.tensor(lengths))
        return Documents(tuple(lengths), positions.to(device), starts.to(device), longest or max(lengths))


def takes_packed(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether attention over a whole flat buffer is one kernel: FlashAttention of GPUs from compute capability 8.0."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0
            and head_size <= 256 and torch.cuda.get_device_capability(device) >= (8, 0))


def attend_packed(documents: Documents) -> Attend:
    """Return causal attention inside each document of a flat buffer: one kernel for all where there is one, else a call
    for each document, which is also the reference for the tests."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        if takes_packed(q.device, q.dtype, q.size(-1)):
            from torch.nn.attention.varlen import varlen_attn

            starts, longest = documents.starts, documents.longest
            return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))  # type: ignore
        if q.device.type == "cpu":  # where these kernels are slow in smaller types
            q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(1)
        split = [x.transpose(0, 1)[None].split(documents.lengths, dim=2) for x in (q, k, v)]
        attended = [F.scaled_dot_product_attention(q1, k1, v1, is_causal=True)[0] for q1, k1, v1 in zip(*split)]
        return torch.cat(attended, dim=1).transpose(0, 1)

    return attend


class KVCache:
    """Keys and values of one growing sequence, preallocated for a whole context."""

    def __init__(self, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        shape = (config.n_layer, 2, config.n_head, config.context_length, config.head_size)
        self.cached = torch.empty(shape, device=device, dtype=dtype)
        self.length, self.capacity = 0, config.context_length

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the new keys and values after the cached ones; attend to all of them. The mask is counted from the
        lower right corner: the last query sees every key."""
        new, end = qkv.size(0), self.length + qkv.size(0)
        q, kv = qkv.permute(1, 2, 0, 3).split((1, 2))  # (1 or 2, n_head, new, head_size)
        cached = self.cached[layer, :, :, :end]
        cached[:, :, self.length:] = kv
        mask = None
        if 1 < new < end:
            mask = torch.ones(new, end, dtype=torch.bool, device=qkv.device).tril(self.length)
        attended = F.scaled_dot_product_attention(q, cached[:1], cached[1:], attn_mask=mask, is_causal=new == end)
        return attended[0].transpose(0, 1)


class Linear(nn.Linear):
    """A linear layer whose product is in the type of its weights, which may be smaller than that of what flows."""

    multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.linear)  # or what is faster where it trains

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x.to(self.weight.dtype), self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, recompute: str) -> Tensor:
        """(n_tokens, n_embd) -> same shape."""
        wide = self.c_fc(x)
        if recompute == "gelu" and torch.compiler.is_compiling():
            return again_in_backward(lambda wide: self.c_proj(gelu(wide)), wide)
        bent = gelu(wide)
        if recompute != "gelu":
            return self.c_proj(bent)
        # as again_in_backward does, which would import the compiler: a second of each start on a CPU
        place = bent.data_ptr(), bent.shape
        with saved_tensors_hooks(lambda kept: None if (kept.data_ptr(), kept.shape) == place else kept,
                                 lambda kept: gelu(wide) if kept is None else kept):
            return self.c_proj(bent)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None, recompute: str) -> Tensor:
        """x (n_tokens, n_embd) -> same shape, or (n_rows, n_embd) when only some rows are wanted."""
        attn = self.attn
        qkv = attn.c_attn(self.ln_1(x)).view(x.size(0), 3, attn.n_head, attn.head_size)
        attended = attend(self.layer, qkv).reshape(x.size(0), -1)
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        x = x + attn.c_proj(attended)
        return x + self.mlp(self.ln_2(x), recompute)


class Transformer(nn.Module):
    """Everything but the output scores; a module of its own because the published names begin with it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # from_pretrained because PyTorch's own initial values, never used here, take a second to compute
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.context_length, config.n_embd), freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # What the backward pass computes again so that it need not be kept: "nothing", the results of each "gelu", a
        # fifth of everything, or the "blocks", of which only the inputs stay.
        self.recompute = "gelu"

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            wanted = rows if layer == len(self.h) - 1 else None
            recompute = self.recompute if torch.is_grad_enabled() else "nothing"
            if recompute == "blocks":
                x = again_in_backward(block, x, attend, wanted, "nothing")
            else:
                x = block(x, attend, wanted, recompute)
        return self.ln_f(x)


class GPT(nn.Module):
    """GPT-2 over a flat buffer of tokens. forward and decode give hidden states; logits turns those into scores."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.output: nn.Module | None = None  # stands in for the tied matrix where another layout is faster

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialization: normal, std 0.02; the two projections onto the residual stream are divided by
        sqrt(2 n_layer) (Radford et al. 2019, section 2.3); positions 0.01 as in openai/gpt-2."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                std = 0.01 if "wpe" in name else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor, documents: Documents, rows: Tensor | None = None) -> Tensor:
        """Hidden states of packed documents, (n_tokens, n_embd) or (n_rows, n_embd).

        tokens (n_tokens,) int64; rows (n_rows,) int64 names the tokens whose states are wanted (default: all).
        """
        return self.transformer(tokens, documents.positions, attend_packed(documents), rows)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Hidden states of tokens that follow those in the cache, which grows by them.

        tokens (n_tokens,) int64 -> (n_tokens, n_embd). Raises ValueError when the context would overflow.
        """
        end = cache.length + tokens.size(0)
        if end > cache.capacity:
            raise ValueError(f"{end} tokens do not fit a context of {cache.capacity}")
        hidden = self.transformer(tokens, torch.arange(cache.length, end, device=tokens.device), cache.attend, None)
        cache.length = end
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, n_embd) -> (n, vocab_size)."""
        return F.linear(hidden, self.transformer.wte.weight) if self.output is None else self.output(hidden)
