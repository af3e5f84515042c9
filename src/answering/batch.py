"""Several prompts at once: each step decodes one token of every sequence, so the weights are read once for all."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from answering.generate import GREEDY, choose
from answering.settings import Settings
from model import GPT, KVCache

WIDTH = 16  # sequences that grow together: twice as many gain another quarter on a CPU, and need twice the memory
LARGEST_CACHE = 1 << 30  # bytes: fewer sequences grow together where their keys and values would need more


class Rows:
    """Keys and values of several growing sequences, one a row. A prompt is read alone; then all grow by a token a step.
    """

    def __init__(self, model: GPT, n_rows: int, capacity: int) -> None:
        config, weight = model.config, model.transformer.wte.weight
        self.model, self.alone = model, KVCache(config, weight.device, weight.dtype)
        # zeros, because a row's attention passes over what longer rows have beyond its end: 0 times NaN is NaN
        self.cached = self.alone.cached.new_zeros(config.n_layer, 2, n_rows, config.n_head, capacity, config.head_size)
        self.lengths: list[int] = []  # of the rows in use, which are the first ones

    def add(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt into the next row. Returns the scores of the token after it, (1, vocab_size)."""
        self.alone.cached, self.alone.length = self.cached[:, :, len(self.lengths)], 0
        hidden = self.model.decode(torch.tensor(prompt, device=self.cached.device), self.alone)
        self.lengths.append(len(prompt))
        return self.model.logits(hidden[-1:])

    def remove(self, row: int) -> None:
        """The last row takes the place of this one."""
        length = self.lengths.pop()
        if row < len(self.lengths):
            self.cached[:, :, row, :, :length] = self.cached[:, :, len(self.lengths), :, :length]
            self.lengths[row] = length

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Grow each row by its token. Returns the scores of the tokens after those, (n_rows, vocab_size)."""
        positions = torch.tensor(self.lengths, device=self.cached.device)
        n_rows, longest = len(self.lengths), max(self.lengths) + 1
        rows = torch.arange(n_rows, device=positions.device)
        seen = torch.arange(longest, device=positions.device) <= positions[:, None, None, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            cached = self.cached[layer, :, :n_rows]  # (2, n_rows, n_head, capacity, head_size)
            cached[:, rows, :, positions] = qkv[:, 1:]  # (n_rows, 2, n_head, head_size)
            keys, values = cached[..., :longest, :]
            return F.scaled_dot_product_attention(qkv[:, :1].transpose(1, 2), keys, values, attn_mask=seen)[:, :, 0]

        hidden = self.model.transformer(positions.new_tensor(tokens), positions, attend, None)
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.logits(hidden)


@torch.inference_mode()
def finished(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             settings: Settings = GREEDY, stop_token: int | None = None,
             generators: Sequence[torch.Generator] | None = None,
             is_stopped: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of the prompt, the tokens after it) as they end: those that generate() yields for it alone. Those
    that have not ended when it is_stopped, which is asked before each step, are not yielded.

    max_new_tokens is at least 1; generators, one for each prompt, make sampling reproducible.
    At most WIDTH sequences, fewer if they are large, grow together: when one ends, the next prompt takes its place, the
    longest first. Raises ValueError for an empty prompt, or one that leaves no room in the context.
    """
    config = model.config
    for prompt in prompts:
        if not 0 < len(prompt) < config.context_length:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {config.context_length}")
    limits = [min(max_new_tokens, config.context_length - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    active: list[int] = []  # the number of each row's prompt
    capacity = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=1)
    row_bytes = 2 * config.n_layer * config.n_embd * capacity * model.transformer.wte.weight.element_size()
    width = max(1, min(WIDTH, len(prompts), LARGEST_CACHE // row_bytes))
    rows = Rows(model, width, capacity)
    while (waiting or active) and not is_stopped():
        # read a prompt where a row is free, else one token for every row
        if waiting and len(active) < width:
            first, logits = len(active), rows.add(prompts[waiting[-1]])
            active.append(waiting.pop())
        else:
            first, logits = 0, rows.step([answers[number][-1] for number in active])
        # from the last row on, because that takes the place of one that ends
        for row in reversed(range(first, len(active))):
            number, answer = active[row], answers[active[row]]
            token = choose(logits[row - first], settings, generators[number] if generators else None, answer)
            if token != stop_token:
                answer.append(token)
            if token == stop_token or len(answer) == limits[number]:
                rows.remove(row)
                active[row] = active[-1]
                active.pop()
                yield number, answer
