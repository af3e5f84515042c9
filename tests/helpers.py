"""Prepared data of a small vocabulary, made in no time, and runs with them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

import prepare_instruct_dataset
import train_instruct
from conftest import ROOT, SRC
from data.rows import open_sources
from data.shapes import Example, Shapes
from data.shards import DataWriter, Document, open_prepared
from dataloader_instruct import InstructData
from instruct_format import END_OF_TEXT, encode_conversation, prompt_text, tidy, tokenizer
from model import GPTConfig
from models import SMALL, VOCAB, small_model, write_pretrained
from weights import checkpoint


def write_data(folder: Path, splits: dict[str, Iterable[tuple[list[int], list[int]]]]) -> Path:
    """Prepared data from (tokens, loss mask) of each example of each split."""
    writer = DataWriter(folder)
    for split, examples in splits.items():
        for tokens, mask in examples:
            writer.add(split, Document(np.array(tokens, dtype=np.uint16), np.array(mask, dtype=np.uint8)))
    writer.finish({"source": "made by a test", "tokenizer": "none: a model of any vocabulary may train on this"})
    return folder


def prepare(source: Path, output: Path, *flags: object) -> dict:
    """Prepare a file in this process. Returns the manifest."""
    arguments = ["--dataset", source, "--output_dir", output, *flags]
    assert prepare_instruct_dataset.main([str(argument) for argument in arguments]) == 0
    return open_prepared(output).manifest


def texts_of(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(prompt, response) of every example of each split, decoded from the shards; masks and ends are checked."""
    texts: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for split, data in open_data(folder, 1 << 30).items():
        for number in range(len(data)):
            tokens, mask = (part.tolist() for part in data.example(number))
            begin = mask.index(1)
            assert mask == [0] * begin + [1] * (len(mask) - begin) and tokens.index(END_OF_TEXT) == len(tokens) - 1
            prompt, response = (tokenizer().decode_bytes(part).decode() for part in (tokens[:begin], tokens[begin:-1]))
            texts[split].append((prompt, response))
    return texts


def expected_of(rows: Iterable[dict[str, str]]) -> list[tuple[str, str]]:
    return [(prompt_text(row["instruction"], row["input"]), tidy(row["output"])) for row in rows]


def rows_of(source: Path) -> Iterator[Example]:
    """The examples of a file. Bad rows are an error of the test."""
    for place, row in Shapes({}).examples(open_sources([str(source)], {})):
        assert isinstance(row, Example), f"{place}: {row}"
        yield row


def real_examples(source: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """The first examples of a file, tokenized with the template, ids modulo VOCAB."""
    pairs = [encode_conversation(row.turns) for row in islice(rows_of(source), count)]
    return [([token % VOCAB for token in tokens], mask) for tokens, mask in pairs]


def random_examples(count: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(tokens, loss mask) of examples with one response each."""
    generator, examples = np.random.default_rng(seed), []
    for length in generator.integers(2, longest + 1, count):
        tokens, prompt = generator.integers(0, VOCAB, length).tolist(), int(generator.integers(1, length))
        examples.append((tokens, [0] * prompt + [1] * (len(tokens) - prompt)))
    return examples


def write_random(folder: Path, train: int, val: int, longest: int) -> Path:
    return write_data(folder, {"train": random_examples(train, longest), "val": random_examples(val, longest, seed=1)})


def run_inputs(folder: Path, config: GPTConfig = SMALL) -> tuple[Path, Path]:
    """What resume_flags takes: data of random examples, a pre-trained model."""
    pretrained = write_pretrained(folder / "pretrained.pt", small_model(config=config))
    return write_random(folder / "data", 60, 15, 64), pretrained


def to(folder: Path, *flags: object) -> list[str]:
    """Flags of a run whose checkpoints and logs go to a folder, and others."""
    return ["--checkpoint_dir", str(folder), "--tensorboard_dir", str(folder / "runs"), *map(str, flags)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def open_data(folder: Path, context_length: int = 1024) -> dict[str, InstructData]:
    prepared = open_prepared(folder)
    return {split: InstructData(prepared, split, context_length) for split in ("train", "val")}


def run_ranks(script: Path, world_size: int, *arguments: object) -> None:
    """Run a script on world_size gloo processes of this machine and wait for all of them to end well."""
    command = [sys.executable, str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "WORLD_SIZE": str(world_size), "INSTRUCT_STORE": f"file://{folder}/store",
                       "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SRC}:{ROOT / 'tests'}"}
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                      env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                     for rank in range(world_size)]
        errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)


def resume_flags(data_dir: Path, pretrained: Path) -> list[str]:
    """24 steps over three epochs, two or more micro-batches each, every step saved, an evaluation every fourth."""
    return [str(flag) for flag in (
        "--data_dir", data_dir, "--pretrained_model", pretrained, "--context_length", 64, "--total_batch_size", 256,
        "--mini_batch_size", 2, "--max_steps", 24, "--learning_rate", 1e-3, "--warmup_steps", 4, "--eval_freq", 4,
        "--checkpoint_freq", 1, "--keep_last", 100, "--log_freq", 1, "--device", "cpu")]


def train(inputs: tuple[Path, Path], folder: Path, *flags: object) -> int:
    """A run of resume_flags and others in this process; its checkpoints and logs go to the folder."""
    usual = resume_flags(*inputs)
    for flag, excluded in (("--from_scratch", "--pretrained_model"), ("--epochs", "--max_steps")):
        if flag in flags:
            place = usual.index(excluded)
            del usual[place:place + 2]
    return train_instruct.main([*usual, *to(folder, *flags)])


def resume(folder: Path, source: object, *flags: object) -> int:
    return train_instruct.main(to(folder, "--resume", source, *flags))


def trajectory(path: Path) -> dict:
    """What must be the same however a run came to this checkpoint: all but folders and free options."""
    state = checkpoint.load(path)
    return {key: value for key, value in state.items() if key not in ("options", "name")}
