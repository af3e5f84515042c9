"""How cost grows: with context length, model size, number of examples and processes. Writes docs/growth.png.

    python benchmarks/growth.py [--rounds 3] [--output docs/growth.png]

A step's cost is measured on examples of random tokens, all of them response; points of a curve take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Worker, machine, rate, report, serve, take_turns

SIZES = {"10M": (5, 4, 128), "30M": (6, 6, 384), "60M": (8, 8, 512), "124M": (12, 12, 768), "355M": (24, 16, 1024)}
CONTEXTS = (128, 256, 512, 1024)
EXAMPLES = (1_000, 10_000, 100_000, 1_000_000)
TOKENS = 1024  # of a measured step


def write_examples(folder: Path, count: int, length: int) -> None:
    """Prepared data of count equal examples of random tokens, through the project's own writer."""
    import numpy as np

    from data.shards import SPLITS, DataWriter, Document

    generator, writer, mask = np.random.default_rng(0), DataWriter(folder), np.ones(length, dtype=np.uint8)
    for split in SPLITS:
        for _ in range(count if split == "train" else 1):
            writer.add(split, Document(generator.integers(0, 50257, length, dtype=np.uint16), mask))
    writer.finish({"source": "random tokens"})


def steps(size: str, context: str, folder: str) -> None:
    """Measure one optimizer step of TOKENS tokens over all processes."""
    import torch

    from data.shards import open_prepared
    from dataloader_instruct import ExampleStream, InstructData, Position
    from model import GPT, GPTConfig
    from training.options import parse_options
    from training.processes import join
    from training.step import Learner, learning_rate, train_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    processes = join("cpu")
    n_layer, n_head, n_embd = SIZES[size]
    model = GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd))
    model.init_weights(0)
    options = parse_options(["--total_batch_size", str(TOKENS * 128 // 127 + 1)])
    data = InstructData(open_prepared(Path(folder) / context), "train", 1024)
    stream = ExampleStream(data.lengths, 0, options.total_batch_size)
    learner, done = Learner(model, options, processes), 0

    def work() -> float:
        nonlocal done
        plan = data.plan(stream.step(Position())[0], 1024, processes.world_size)
        train_step(learner, data, plan, learning_rate(done, options))
        done += 1
        return plan.tokens

    if processes.world_size == 1:
        serve(work)
        return
    work()
    for _ in range(3):  # several processes measure on their own: they cannot all read the parent's line
        begin = time.perf_counter()
        units = work()
        if processes.is_main:
            report(units, time.perf_counter() - begin)


def loader(count: str, folder: str) -> None:
    """Open data and find the first step: seconds, and memory beyond what was there before, in bytes an example."""
    from data.shards import open_prepared
    from dataloader_instruct import ExampleStream, InstructData, Position

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    data = InstructData(open_prepared(Path(folder)), "train", 1024)
    ExampleStream(data.lengths, 0, 65536).step(Position())
    elapsed = time.perf_counter() - begin
    kept = data.lengths.nbytes + data.starts.nbytes + data.shard_numbers.nbytes + 4 * len(data)  # and the epoch's order
    print(count, elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, kept / int(count))


def two_processes(folder: Path) -> float:
    """Tokens a second of two gloo processes with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, __file__, "--worker", "steps", "60M", "256", str(folder)],
                              stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank),
                                   "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
             for rank in range(2)]
    output = [rank.communicate()[0] for rank in ranks][0]
    return rate([json.loads(line) for line in output.splitlines() if line.startswith('{"units"')])


def measure(folder: Path, rounds: int) -> dict[str, list[tuple[object, float]]]:
    """The curves: name -> (x, y) points."""
    curves: dict[str, list[tuple[object, float]]] = {}
    for context in CONTEXTS:
        write_examples(folder / str(context), 4 * TOKENS // context, context)
    found = take_turns({str(context): Worker(__file__, "steps", "60M", str(context), str(folder))
                        for context in CONTEXTS}, rounds)
    curves["context length (60M): ms a token"] = [(int(name), 1e3 / rate(results)) for name, results in found.items()]
    curves["model (256 tokens an example): ms a token"] = []
    for size in SIZES:
        found = take_turns({size: Worker(__file__, "steps", size, "256", str(folder))}, rounds)
        curves["model (256 tokens an example): ms a token"].append((size, 1e3 / rate(found[size])))
    single = take_turns({"1": Worker(__file__, "steps", "60M", "256", str(folder), threads=1)}, rounds)["1"]
    curves["processes of one thread (60M): tokens a second"] = [(1, rate(single)), (2, two_processes(folder))]
    curves["examples: seconds to open and plan"], curves["examples: bytes kept for each"] = [], []
    for count in EXAMPLES:
        write_examples(folder / f"many{count}", count, 8)
        command = [sys.executable, __file__, "--worker", "loader", str(count), str(folder / f"many{count}")]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        curves["examples: seconds to open and plan"].append((count, float(line[1])))
        curves["examples: bytes kept for each"].append((count, float(line[3])))
    return curves


def plot(curves: dict[str, list[tuple[object, float]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), constrained_layout=True)
    for axis, (name, points) in zip(axes, curves.items()):
        axis.plot([str(x) for x, _ in points], [y for _, y in points], "o-")
        axis.set_title(name.split(":")[0], fontsize=9)
        axis.set_ylabel(name.split(": ")[1])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(output, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "growth.png")
    options = parser.parse_args()
    if options.worker:
        {"steps": steps, "loader": loader}[options.worker[0]](*options.worker[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        curves = measure(Path(folder), options.rounds)
    for name, points in curves.items():
        print(f"{name}: " + ", ".join(f"{x} {y:.3g}" for x, y in points))
    plot(curves, options.output)


if __name__ == "__main__":
    main()
