"""Which examples a step has, and how they are dealt to flat micro-batches and ranks.

Everything is a function of the example lengths, the seed and a position of two integers, so every rank computes the
same plan on its own, and a run resumes anywhere without replaying anything.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.shards import Document, Prepared, open_shard
from errors import UserError
from model import Documents


@dataclass(frozen=True)
class Position:
    """Where the stream of examples stands: permutation(epoch), next example index."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """One flat buffer of whole examples, and which of its positions are trained to predict what."""

    tokens: Tensor  # (n_tokens,) int64
    documents: Documents  # the examples, in their order
    rows: Tensor  # (n_response,) int64: positions whose next token is trained, a response token (or any: --loss_on all)
    targets: Tensor  # (n_response,) int64: those next tokens

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device. A GPU copies it when it gets there, without waiting."""
        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        moved = replace(self.documents, positions=move(self.documents.positions), starts=move(self.documents.starts))
        return MicroBatch(move(self.tokens), moved, move(self.rows), move(self.targets))


@dataclass(frozen=True)
class Plan:
    """What the examples of a step amount to, and how they are dealt to all ranks."""

    tokens: int
    response_tokens: int
    micro_batches: list[list[int]]  # examples of each; rank r computes r, r + world_size, ...


class InstructData:
    """One split of prepared data, memory-mapped, without the examples longer than context_length.

    lengths and trained_tokens, (n_examples,) int32 each, are all that planning needs. loss_on all trains every token,
    not the responses alone.
    Raises UserError where open_shard does, and when no example is short enough.
    """

    def __init__(self, prepared: Prepared, split: str, context_length: int, loss_on: str = "response") -> None:
        self.context_length = context_length
        self.shards = [open_shard(prepared.folder, split, shard) for shard in prepared.manifest["shards"][split]]
        if loss_on == "all":
            for shard in self.shards:  # ones without end, in no memory
                shard["loss_mask"] = np.broadcast_to(np.uint8(1), len(shard["tokens"]))
        numbers = np.repeat(np.arange(len(self.shards)), [len(shard["starts"]) for shard in self.shards])
        starts = np.concatenate([shard["starts"] for shard in self.shards])  # in their shards
        everything = np.concatenate([np.diff(shard["starts"], append=len(shard["tokens"])) for shard in self.shards])
        kept = everything <= context_length
        self.lengths, self.starts, self.shard_numbers = (
            each[kept].astype(np.int32) for each in (everything, starts, numbers))
        counts = [np.add.reduceat(shard["loss_mask"], shard["starts"], dtype=np.int32)
                  - shard["loss_mask"][shard["starts"]] for shard in self.shards]  # the first of each is never trained
        self.trained_tokens = np.concatenate(counts)[kept]
        self.left_out = len(everything) - len(self)
        if not len(self):
            raise UserError(f"{prepared.folder}: no example of the {split} split fits a context_length of "
                            f"{context_length}; the shortest has {everything.min()} tokens"
                            + "; prepare with a larger --val_fraction" * (split == "val"))

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, number: int) -> Document:
        """One kept example."""
        shard, start = self.shards[self.shard_numbers[number]], int(self.starts[number])
        end = start + int(self.lengths[number])
        return Document(shard["tokens"][start:end], shard["loss_mask"][start:end])

    def plan(self, examples: Sequence[int], most_tokens: int, world_size: int) -> Plan:
        """Deal examples to micro-batches of at most most_tokens tokens, for this many ranks."""
        return Plan(int(self.lengths[examples].sum()), int(self.trained_tokens[examples].sum()),
                    deal(examples, self.lengths, most_tokens, world_size))

    def micro_batch(self, examples: Sequence[int], n_tokens: int = 1) -> MicroBatch:
        """The examples one after another, filled up to at least n_tokens with documents without targets: where graphs
        want a fixed size, or a rank that has no example takes part in the step all the same."""
        parts = [self.example(number) for number in examples]
        missing = n_tokens - sum(len(part.tokens) for part in parts)
        for begin in range(0, missing, self.context_length):
            zeros = np.zeros(min(missing - begin, self.context_length), dtype=np.uint8)
            parts.append(Document(zeros, zeros))
        documents = Documents.of([len(part.tokens) for part in parts], longest=self.context_length)
        flat, mask = map(np.concatenate, zip(*parts))
        mask[documents.starts[:-1]] = 0  # nothing comes before a first token
        tokens, predicted = torch.from_numpy(flat.astype(np.int64)), torch.from_numpy(np.flatnonzero(mask))
        return MicroBatch(tokens, documents, predicted - 1, tokens[predicted])


class ExampleStream:
    """permutation(epoch 0), permutation(epoch 1), ... cut into steps of whole examples.

    A step takes the next examples while their tokens sum to at most 127/128 of total_batch_size: at least one, at most
    as many as there are.
    """

    def __init__(self, lengths: np.ndarray, seed: int, total_batch_size: int) -> None:
        self.lengths, self.seed = lengths, seed
        self.most_tokens = total_batch_size * 127 // 128
        self._epoch, self._order = -1, np.empty(0, dtype=np.int32)

    def order(self, epoch: int) -> np.ndarray:
        """The examples in the order of this epoch, (n_examples,) int32."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(np.arange(len(self.lengths), dtype=np.int32))
        return self._order

    def step(self, position: Position) -> tuple[list[int], Position]:
        """The examples of the step that begins at position, and the position after them."""
        examples: list[int] = []
        epoch, index, tokens = position.epoch, position.index, 0
        while True:
            if index == len(self.lengths):
                epoch, index = epoch + 1, 0
            example = int(self.order(epoch)[index])
            tokens += int(self.lengths[example])
            if examples and (tokens > self.most_tokens or len(examples) == len(self.lengths)):
                return examples, Position(epoch, index)
            examples.append(example)
            index += 1

    @cached_property
    def steps_per_epoch(self) -> float:
        """How many steps the first epoch is."""
        steps, position = 0, Position()
        while position.epoch == 0 and position.index < len(self.lengths):
            steps, (_, position) = steps + 1, self.step(position)
        return steps / (position.epoch + position.index / len(self.lengths))

    def steps_in(self, epochs: float) -> int:
        """The fewest steps that go through the data this often."""
        return max(1, math.ceil(epochs * self.steps_per_epoch - 1e-6))


def deal(examples: Sequence[int], lengths: np.ndarray, most_tokens: int, world_size: int) -> list[list[int]]:
    """Deal examples, longest first to the least loaded, into the fewest micro-batches.

    Each holds at most most_tokens tokens, and their number is a multiple of world_size; rank r computes
    micro-batches r, r + world_size, ... No example may be longer than most_tokens.
    """
    longest_first = sorted(examples, key=lambda example: (-int(lengths[example]), example))
    count = -(-max(int(lengths[examples].sum()), 1) // (most_tokens * world_size)) * world_size
    while True:
        micro_batches: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, number) for number in range(count)]
        for example in longest_first:
            load, number = loads[0]
            micro_batches[number].append(example)
            heapq.heapreplace(loads, (load + int(lengths[example]), number))
        if max(loads)[0] <= most_tokens:
            return micro_batches
        count += world_size
