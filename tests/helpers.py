"""Prepared data and pre-trained models of a small vocabulary, made in no time, for the tests of training."""

import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import checkpoint
from conftest import ROOT, SRC
from dataloader_instruct import InstructData
from durable import durable_file
from instruct_format import encode_example
from manifest import manifest_bytes
from model import GPT, GPTConfig
from prepare_instruct_dataset import Selection, ShardWriter, Tokenized, build_manifest
from read_examples import Example, read_examples
from train_options import complete_options, parse_options

VOCAB = 1009  # a prime: real token ids modulo this keep the real lengths and masks
SMALL = GPTConfig(context_length=1024, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=32)


def write_data(folder: Path, splits: dict[str, Iterable[tuple[list[int], int]]]) -> Path:
    """Prepared data from (tokens, number of prompt tokens) of each example of each split."""
    writers = {split: ShardWriter(folder, split) for split in ("train", "val")}
    selection = Selection(Namespace())
    for split, examples in splits.items():
        for tokens, prompt_tokens in examples:
            writers[split].add(Tokenized(split, np.array(tokens, dtype=np.uint16), prompt_tokens))
            selection.read += 1
        writers[split].flush()
    options = Namespace(dataset="made by a test", seed=0, val_fraction=0.05)
    with durable_file(folder / "dataset_info.json") as file:
        file.write(manifest_bytes(build_manifest(options, selection, writers)))
    return folder


def real_examples(source: Path, count: int) -> list[tuple[list[int], int]]:
    """The first examples of a file, tokenized with the template, ids modulo VOCAB."""
    examples = []
    for _, row in read_examples(str(source)):
        assert isinstance(row, Example)
        tokens, mask = encode_example(row.instruction, row.input, row.output)
        examples.append(([token % VOCAB for token in tokens], mask.index(1)))
        if len(examples) == count:
            break
    return examples


def random_examples(count: int, longest: int, seed: int = 0) -> list[tuple[list[int], int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    return [(generator.integers(0, VOCAB, length).tolist(), int(generator.integers(1, length))) for length in lengths]


def small_model(seed: int = 0, config: GPTConfig = SMALL) -> GPT:
    """Random weights, norms and biases moved off their initial values, so that all of them count."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def write_pretrained(path: Path, model: GPT) -> Path:
    checkpoint.save(path, {"step": 0, "val_losses": [], "template": None, "model_config": vars(model.config),
                           "model": model.state_dict()})
    return path


def options_of(*flags: object) -> Namespace:
    """Complete trainer options from flags."""
    return complete_options(parse_options([str(flag) for flag in flags]))


def open_data(folder: Path, context_length: int = 1024) -> dict[str, InstructData]:
    return {split: InstructData(folder, split, context_length) for split in ("train", "val")}


def run_ranks(script: Path, world_size: int, *arguments: object, timeout: float = 240) -> None:
    """Run a script on world_size gloo processes of this machine and wait for all of them to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SRC}:{ROOT / 'tests'}"}
    command = [sys.executable, str(script), *map(str, arguments)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                  env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(world_size)]
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)


def resume_flags(data_dir: Path, pretrained: Path) -> list[str]:
    """24 steps over three epochs, two or more micro-batches each, every step saved, an evaluation every fourth."""
    return [str(flag) for flag in (
        "--data_dir", data_dir, "--pretrained_model", pretrained, "--context_length", 64, "--total_batch_size", 256,
        "--mini_batch_size", 2, "--max_steps", 24, "--learning_rate", 1e-3, "--warmup_steps", 4, "--eval_freq", 4,
        "--checkpoint_freq", 1, "--keep_last", 100, "--log_freq", 1, "--device", "cpu")]


def same_state(one: object, other: object) -> bool:
    """Equal to the bit, tensors and plain values alike."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(same_state, one, other))
    return one == other


def trajectory(path: Path) -> dict:
    """What must be the same however a run came to this checkpoint: all but folders and free options."""
    state = checkpoint.load(path)
    return {key: value for key, value in state.items() if key not in ("options", "name")}
