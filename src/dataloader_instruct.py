"""Which examples a step has, and how they are dealt to flat micro-batches and ranks.

Everything is a function of the example lengths, the seed and a position of two integers, so every rank computes the
same plan on its own, and a run resumes anywhere without replaying anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from durable import sha256_of
from instruct_format import VOCAB_SIZE
from manifest import KINDS, read_manifest, shard_file

_TYPES = {"tokens": np.uint16, "loss_mask": np.uint8, "starts": np.int64}


@dataclass(frozen=True)
class Position:
    """Where the stream of examples stands: permutation(epoch), next example index."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """One flat buffer of whole examples, and which of its positions are trained to predict what."""

    tokens: Tensor  # (n_tokens,) int64
    lengths: list[int]  # of the examples, in their order
    rows: Tensor  # (n_response,) int64: positions whose next token is a response token
    targets: Tensor  # (n_response,) int64: those next tokens


class InstructData:
    """One split of prepared data, memory-mapped, without the examples longer than context_length.

    lengths (n_examples,) int32 is all that planning needs; fingerprint says which data these are. Raises UserError
    when a shard is missing, not the one the manifest names (SHA-256), or not what a model of vocab_size can be trained
    on.
    """

    def __init__(self, data_dir: Path, split: str, context_length: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.shards: list[dict[str, np.ndarray]] = []
        lengths, self.first_example = [], [0]
        manifest = read_manifest(data_dir)
        self.fingerprint: str = manifest["fingerprint"]
        for entry in manifest["shards"][split]:
            shard = {kind: _open_array(shard_file(data_dir, split, entry, kind), entry["sha256"][kind])
                     for kind in KINDS}
            wrong = _what_is_wrong(shard, entry, min(vocab_size, VOCAB_SIZE))
            if wrong:
                raise UserError(f"{data_dir / split / entry['name']}: {wrong}; prepare the data again")
            self.shards.append(shard)
            lengths.append(np.diff(shard["starts"], append=len(shard["tokens"])).astype(np.int32))
            self.first_example.append(self.first_example[-1] + len(shard["starts"]))
        everything = np.concatenate(lengths)
        self.kept = np.flatnonzero(everything <= context_length).astype(np.int32)
        self.lengths = everything[self.kept]
        self.left_out = len(everything) - len(self.kept)
        if not len(self.kept):
            raise UserError(f"{data_dir}: no example of the {split} split fits a context_length of {context_length}; "
                            f"the shortest has {everything.min()} tokens")

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) uint16 and loss mask (n,) uint8 of one kept example."""
        original = int(self.kept[number])
        shard_number = int(np.searchsorted(self.first_example, original, side="right")) - 1
        shard = self.shards[shard_number]
        start = int(shard["starts"][original - self.first_example[shard_number]])
        end = start + int(self.lengths[number])
        return shard["tokens"][start:end], shard["loss_mask"][start:end]

    def response_tokens(self, examples: Sequence[int]) -> int:
        return sum(int(self.example(number)[1].sum()) for number in examples)

    def micro_batch(self, examples: Sequence[int]) -> MicroBatch:
        """The examples one after another. No examples make one document without targets, so that a rank which has
        none takes part in the step all the same."""
        parts = [self.example(number) for number in examples]
        parts = parts or [(np.zeros(1, dtype=np.uint16), np.zeros(1, dtype=np.uint8))]
        lengths = [len(tokens) for tokens, _ in parts]
        tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in parts]).astype(np.int64))
        mask = np.concatenate([mask for _, mask in parts])
        mask[[0, *accumulate(lengths[:-1])]] = 0  # nothing comes before a document's first token
        predicted = torch.from_numpy(np.flatnonzero(mask))
        return MicroBatch(tokens, lengths, predicted - 1, tokens[predicted])


def _open_array(path: Path, sha256: str) -> np.ndarray:
    try:
        with path.open("rb", buffering=0) as file:
            digest = sha256_of(file).hexdigest()
        if digest != sha256:
            raise UserError(f"{path}: damaged or changed (its SHA-256 is not the manifest's); prepare the data again")
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load it never unpickles nor unzips
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; prepare the data again") from error
    except Exception as error:  # a forged file with a fitting SHA-256 fails anywhere in numpy's reader
        raise UserError(f"{path}: not an array that can be read ({type(error).__name__}); prepare the data again"
                        ) from error


def _what_is_wrong(shard: dict[str, np.ndarray], entry: dict[str, Any], vocab_size: int) -> str | None:
    """None for a shard as ShardWriter writes it. A SHA-256 shows what was changed later, not what was forged."""
    if any(shard[kind].dtype != dtype or shard[kind].ndim != 1 for kind, dtype in _TYPES.items()):
        return "its arrays are of another type"
    tokens, mask, starts = (shard[kind] for kind in KINDS)
    if (len(tokens), len(mask), len(starts)) != (entry["tokens"], entry["tokens"], entry["examples"]):
        return "it has not as many tokens or examples as the manifest says"
    ends = np.append(starts[1:], len(tokens))
    if not len(starts) or starts[0] != 0 or (ends <= starts).any():
        return "its starts do not fit its tokens"
    if mask.max() > 1 or mask[starts].any() or not mask[ends - 1].all():
        return "its loss mask is not 0 where an example begins and 1 where it ends"
    if tokens.max() >= vocab_size:
        return f"it has token {tokens.max()}, the vocabulary has {vocab_size}"
    return None


class ExampleStream:
    """permutation(epoch 0), permutation(epoch 1), ... cut into steps of whole examples.

    A step takes the next examples while their tokens sum to at most 127/128 of total_batch_size, at least one.
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
            if examples and tokens > self.most_tokens:
                return examples, Position(epoch, index)
            examples.append(example)
            index += 1


def deal(examples: Sequence[int], lengths: np.ndarray, most_tokens: int, world_size: int) -> list[list[int]]:
    """Deal examples, longest first to the least loaded, into the fewest micro-batches.

    Each holds at most most_tokens tokens, and their number is a multiple of world_size; rank r computes
    micro-batches r, r + world_size, ... No example may be longer than most_tokens.
    """
    longest_first = sorted(examples, key=lambda example: (-int(lengths[example]), example))
    tokens = sum(int(lengths[example]) for example in examples)
    count = -(-max(tokens, 1) // (most_tokens * world_size)) * world_size
    while True:
        hands: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, number) for number in range(count)]
        for example in longest_first:
            load, number = loads[0]
            hands[number].append(example)
            heapq.heapreplace(loads, (load + int(lengths[example]), number))
        if max(loads)[0] <= most_tokens:
            return hands
        count += world_size
