"""Token ids in, token ids out, one at a time: prefill, cached decode, sampling, stopping. Knows no text."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from answering.settings import Settings
from errors import CheckpointError
from model import GPT, KVCache

GPT2_TOKENS = 50257  # rows after these pad a vocabulary for the hardware; they are never sampled
PREFILL = 128  # tokens of a prompt that are read at a time: between two pieces it can be stopped
REMEMBERED = 64  # tokens of the answer that repetition_penalty looks back at

GREEDY = Settings(temperature=0.0)


def likeliest(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The tokens that the next one is drawn from, likeliest first, and their probabilities, on the CPU.

    Of logits (n_vocab,) only the top_k largest stay; divided by temperature they become probabilities; of these, the
    smallest set of the likeliest that sum to at least top_p (Holtzman et al. 2020) stays, and is made to sum to 1.
    Temperature must be above 0, however little: the scores are at most 0 and in fp64, so that none overflows.
    """
    n_vocab = logits.size(0)
    largest, tokens = (part.cpu() for part in logits.topk(min(settings.top_k or n_vocab, n_vocab)))
    kept = ((largest.double() - _finite(largest[0])) / settings.temperature).softmax(0)
    if settings.top_p < 1.0:
        kept = kept[:int((kept.cumsum(0) - kept < settings.top_p).sum())]  # the likeliest always stays: 0 is below
    return tokens[:kept.size(0)], kept / kept.sum()


def choose(logits: Tensor, settings: Settings, generator: torch.Generator | None = None,
           answer: Sequence[int] = ()) -> int:
    """One token id from logits (vocab_size,). Ties of the greedy choice go to the lowest id. answer holds the tokens
    so far, for repetition_penalty: it divides what speaks for a token and multiplies what speaks against it (Keskar
    et al. 2019). Raises CheckpointError when the logits are not finite numbers."""
    logits = logits[:GPT2_TOKENS]
    if settings.repetition_penalty != 1 and answer:
        recent = torch.tensor(answer[-REMEMBERED:], device=logits.device)
        scores = logits[recent]
        penalized = torch.where(scores > 0, scores / settings.repetition_penalty, scores * settings.repetition_penalty)
        logits = logits.index_copy(0, recent, penalized)
    if settings.temperature == 0:
        token = int(logits.argmax())
        _finite(logits[token])
        return token
    tokens, kept = likeliest(logits, settings)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def _finite(largest: Tensor) -> float:
    """The largest score: NaN counts as larger than all."""
    if not math.isfinite(score := float(largest)):
        raise CheckpointError("the scores are not finite numbers: the weights are damaged; use another checkpoint")
    return score


@torch.inference_mode()
def generate(model: GPT, prompt: Sequence[int], max_new_tokens: int, settings: Settings = GREEDY,
             stop_token: int | None = None, generator: torch.Generator | None = None,
             is_stopped: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Yield up to max_new_tokens token ids that follow the prompt; fewer at stop_token (not yielded), when the context
    is full, or when is_stopped, which is asked after each token and each piece of the prompt. generator (on the CPU)
    makes sampling reproducible.

    Raises ValueError for an empty prompt, or one that leaves no room in the context.
    """
    if not 0 < len(prompt) < model.config.context_length:
        raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {model.config.context_length}")
    weight = model.transformer.wte.weight
    cache = KVCache(model.config, weight.device, weight.dtype)
    answer: list[int] = []
    pieces = torch.tensor(prompt, device=weight.device).split(PREFILL)
    for _ in range(min(max_new_tokens, model.config.context_length - len(prompt))):
        for piece in pieces:
            hidden = model.decode(piece, cache)
            if is_stopped():
                return
        token = choose(model.logits(hidden[-1:])[0], settings, generator, answer)
        if token == stop_token:
            return
        answer.append(token)
        yield token
        pieces = (piece.new_tensor([token]),)
