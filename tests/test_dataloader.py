"""Which examples a step has, and how they are dealt: lists of lengths in, plans out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader_instruct import ExampleStream, Position, deal
from errors import UserError
from helpers import open_data, random_examples, write_data


def stream_of(lengths: list[int], total_batch_size: int, seed: int = 0) -> ExampleStream:
    return ExampleStream(np.array(lengths, dtype=np.int32), seed, total_batch_size)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), total=st.integers(50, 400),
       seed=st.integers(0, 5))
def test_every_example_comes_once_an_epoch_in_steps_of_bounded_size(lengths, total, seed):
    stream, position, seen = stream_of(lengths, total, seed), Position(), []
    while len(seen) < 3 * len(lengths):
        examples, position = stream.step(position)
        tokens = sum(lengths[example] for example in examples)
        assert tokens <= total * 127 // 128 or len(examples) == 1
        following = stream.order(position.epoch + position.index // len(lengths))[position.index % len(lengths)]
        is_whole = len(examples) == len(lengths)
        assert is_whole or tokens + lengths[following] > total * 127 // 128  # a step takes all that fit
        assert len(examples) <= len(lengths)
        seen += examples
    for epoch in range(3):
        assert sorted(seen[epoch * len(lengths):(epoch + 1) * len(lengths)]) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths, total", [([10] * 20, 1000), ([10] * 20, 101), (list(range(1, 60)), 256), ([7], 50)])
def test_epochs_are_the_fewest_steps_that_go_through_the_data_so_often(lengths, total):
    stream, steps, position = stream_of(lengths, total), 0, Position()
    while position.epoch < 1 and position.index < len(lengths):
        _, position = stream.step(position)
        steps += 1
    epochs = position.epoch + position.index / len(lengths)
    assert stream.steps_in(epochs) == steps and stream.steps_in(epochs * 1.01) == steps + 1
    assert stream.steps_in(1e-9) == 1


def test_a_step_far_away_is_found_without_replay(monkeypatch):
    """Two integers are the whole state: a step of epoch 36 needs that epoch's permutation and no other. Each epoch and
    seed has its own."""
    order, epochs, orders = ExampleStream.order, set(), set()
    for seed in (0, 1, 0):
        orders |= {tuple(stream_of([1] * 50, 50, seed).order(epoch)) for epoch in (0, 1)}
    assert len(orders) == 4
    monkeypatch.setattr(ExampleStream, "order", lambda self, epoch: epochs.add(epoch) or order(self, epoch))
    examples, after = stream_of([180] * 10_000, 65536).step(Position(36, 1_234))
    assert (len(examples), after, epochs) == (361, Position(36, 1_234 + 361), {36})


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), room=st.integers(1, 8),
       world_size=st.integers(1, 5))
def test_dealing_is_whole_bounded_and_balanced(lengths, room, world_size):
    hands = deal(range(len(lengths)), np.array(lengths), 100 * room, world_size)
    assert sorted(example for hand in hands for example in hand) == list(range(len(lengths)))
    assert len(hands) % world_size == 0
    loads = [sum(lengths[example] for example in hand) for hand in hands]
    assert max(loads) <= 100 * room
    assert max(loads) - min(loads) <= max(lengths)  # the greedy rule's bound
    assert all(lengths[a] >= lengths[b] for hand in hands for a, b in zip(hand, hand[1:]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_defaults_need_eight_micro_batches_and_fill_them(world_size):
    """65,536 tokens a step of Alpaca-like lengths: 8 micro-batches of 8,192 whatever the number of GPUs."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.7, 20_000), 15, 1000).astype(np.int32)
    stream, position = ExampleStream(lengths, 1337, 65536), Position()
    while position.epoch == 0:
        examples, position = stream.step(position)
        loads = [int(lengths[hand].sum()) for hand in deal(examples, lengths, 8192, world_size)]
        assert len(loads) == 8
        assert max(loads) < 1.01 * sum(loads) / 8


def test_one_buffer_of_whole_examples(tmp_path):
    """tokens, lengths, and for each response token the position before it; nothing comes before a first token."""
    data_dir = write_data(tmp_path, {"train": [([11, 12, 13, 14], [0, 0, 1, 1]), ([21, 22], [1, 1]),
                                               ([31, 32, 33, 34, 35], [0, 1, 0, 1, 1])], "val": [([41, 42], [0, 1])]})
    data = open_data(data_dir)["train"]
    batch = data.micro_batch([1, 0, 2])
    assert batch.tokens.tolist() == [21, 22, 11, 12, 13, 14, 31, 32, 33, 34, 35]
    assert batch.documents.lengths == (2, 4, 5)
    assert batch.rows.tolist() == [0, 3, 4, 6, 8, 9]
    assert batch.targets.tolist() == [22, 13, 14, 32, 34, 35]
    assert deal([], data.lengths, 100, 3) == [[], [], []]  # every rank has a hand, be it empty
    empty = data.micro_batch([])
    assert (empty.documents.lengths, len(empty.tokens), len(empty.rows), len(empty.targets)) == ((1,), 1, 0, 0)


def test_examples_are_found_in_every_shard_and_longer_ones_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 300)
    examples = random_examples(50, 100)
    context_length = len(examples[0][0])
    data = open_data(write_data(tmp_path, {"train": examples, "val": examples[:3]}), context_length)["train"]
    fitting = [example for example in examples if len(example[0]) <= context_length]
    assert len(data.shards) > 3 and data.left_out == 50 - len(fitting) > 0
    assert [tuple(part.tolist() for part in data.example(number)) for number in range(len(data))] == fitting
    shortest = min(len(tokens) for tokens, _ in examples)
    with pytest.raises(UserError, match=f"no example of the train split fits a context_length of {shortest - 1}"):
        open_data(tmp_path, shortest - 1)
