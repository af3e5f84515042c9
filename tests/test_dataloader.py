"""Which examples a step has, and how they are dealt: lists of lengths in, plans out."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from dataloader_instruct import ExampleStream, InstructData, Position, deal
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
        assert tokens + lengths[following] > total * 127 // 128  # a step takes all that fit
        seen += examples
    for epoch in range(3):
        assert sorted(seen[epoch * len(lengths):(epoch + 1) * len(lengths)]) == list(range(len(lengths)))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(stream_of([1] * 50, 50, seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(stream_of([1] * 50, 50, 0).order(0))


def test_a_step_far_away_is_found_at_once():
    """Two integers are the whole state: step 100,000 of a million examples needs one permutation, no replay."""
    lengths = np.full(1_000_000, 180, dtype=np.int32)
    begin = time.perf_counter()
    examples, after = ExampleStream(lengths, 0, 65536).step(Position(36, 123_456))
    seconds = time.perf_counter() - begin
    assert (len(examples), after) == (361, Position(36, 123_456 + 361))
    assert seconds < 1, f"{seconds:.2f} s"


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
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.0, 0.7, 20_000), 15, 1000).astype(np.int32)
    stream, position = ExampleStream(lengths, 1337, 65536), Position()
    while position.epoch == 0:
        examples, position = stream.step(position)
        hands = deal(examples, lengths, 8192, world_size)
        loads = [int(lengths[hand].sum()) for hand in hands]
        assert len(hands) == 8
        assert max(loads) < 1.01 * sum(loads) / 8


def test_no_examples_still_make_hands_for_every_rank():
    assert deal([], np.array([5]), 100, 3) == [[], [], []]


def test_one_buffer_of_whole_examples(tmp_path):
    """tokens, lengths, and for each response token the position before it."""
    data_dir = write_data(tmp_path, {"train": [([11, 12, 13, 14], 2), ([21, 22], 1)], "val": [([31, 32], 1)]})
    batch = open_data(data_dir)["train"].micro_batch([1, 0])
    assert batch.tokens.tolist() == [21, 22, 11, 12, 13, 14]
    assert batch.lengths == [2, 4]
    assert batch.rows.tolist() == [0, 3, 4]
    assert batch.targets.tolist() == [22, 13, 14]


def test_examples_are_found_in_every_shard_and_longer_ones_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_instruct_dataset.SHARD_TOKENS", 300)
    examples = random_examples(50, 100)
    data_dir = write_data(tmp_path, {"train": examples, "val": examples[:3]})
    data = InstructData(data_dir, "train", 60)
    assert len(data.shards) > 3
    fitting = [(tokens, prompt) for tokens, prompt in examples if len(tokens) <= 60]
    assert len(data) == len(fitting) and data.left_out == 50 - len(fitting)
    for number, (tokens, prompt) in enumerate(fitting):
        found, mask = data.example(number)
        assert found.tolist() == tokens
        assert mask.tolist() == [0] * prompt + [1] * (len(tokens) - prompt)


def test_a_context_that_nothing_fits_is_refused(tmp_path):
    data_dir = write_data(tmp_path, {"train": [([1] * 20, 2)], "val": [([1] * 20, 2)]})
    with pytest.raises(UserError, match="no example of the train split fits a context_length of 19"):
        open_data(data_dir, 19)


def data_files(tmp_path: Path) -> list[Path]:
    data_dir = write_data(tmp_path / "data", {"train": random_examples(9, 30), "val": random_examples(4, 30)})
    return sorted(path for path in data_dir.rglob("*") if path.is_file())


def test_missing_and_truncated_files_are_named(tmp_path):
    for path in data_files(tmp_path):
        original = path.read_bytes()
        for damage in (lambda path=path: path.unlink(), lambda path=path: path.write_bytes(b""),
                       lambda path=path, data=original: path.write_bytes(data[:-1])):
            damage()
            with pytest.raises(UserError, match=path.name):
                open_data(tmp_path / "data")
            path.write_bytes(original)
