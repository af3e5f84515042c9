"""Token ids in, token ids out, one at a time: prefill, cached decode, sampling, stopping. Knows no text."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from answering.settings import Settings
from model import GPT, KVCache

GPT2_TOKENS = 50257  # rows after these pad a vocabulary for the hardware; they are never sampled


GREEDY = Settings(temperature=0.0)


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """The distribution that the next token is drawn from: logits (n_vocab,) -> probabilities (n_vocab,).

    The logits are divided by temperature; then only the top_k likeliest stay; of these, the smallest set of the
    likeliest whose probabilities sum to at least top_p (Holtzman et al. 2020) stays. Temperature must be above 0.
    """
    scores = logits.float() / settings.temperature
    if 0 < settings.top_k < scores.size(0):
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[-1], float("-inf"))
    if settings.top_p < 1.0:
        ordered, order = scores.softmax(0).sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= settings.top_p
        beyond[0] = False  # the likeliest always stays
        scores = scores.index_fill(0, order[beyond], float("-inf"))
    return scores.softmax(0)


def choose(logits: Tensor, settings: Settings, generator: torch.Generator | None = None) -> int:
    """One token id from logits (vocab_size,). Ties of the greedy choice go to the lowest id."""
    logits = logits[:GPT2_TOKENS]
    if settings.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits.cpu(), settings), 1, generator=generator))


@torch.inference_mode()
def generate(model: GPT, prompt: Sequence[int], max_new_tokens: int, settings: Settings = GREEDY,
             stop_token: int | None = None, generator: torch.Generator | None = None) -> Iterator[int]:
    """Yield up to max_new_tokens token ids that follow the prompt; fewer at stop_token (not yielded) or when the
    context is full. generator (on the CPU) makes sampling reproducible.

    Raises ValueError for an empty prompt, or one that leaves no room in the context.
    """
    if not 0 < len(prompt) < model.config.context_length:
        raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {model.config.context_length}")
    weight = model.transformer.wte.weight
    cache = KVCache(model.config, weight.device, weight.dtype)
    tokens = torch.tensor(prompt, device=weight.device)
    for _ in range(min(max_new_tokens, model.config.context_length - len(prompt))):
        hidden = model.decode(tokens, cache)
        token = choose(model.logits(hidden[-1:])[0], settings, generator)
        if token == stop_token:
            return
        yield token
        tokens = tokens.new_tensor([token])
