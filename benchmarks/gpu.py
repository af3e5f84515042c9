"""How fast a GPU trains GPT-2 here, and in how much memory: a table with the card's name, in under 4 minutes.

    python benchmarks/gpu.py --dataset FILE [--shape 12,12,768] [--precision auto] [--profile FILE]

Steps of 65,536 tokens of the dataset's examples on random weights, for several mini_batch_sizes, as it is and compiled.
FILE has rows of any shape that preparation takes. Needs torch, numpy, tiktoken and safetensors only.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import ROOT  # noqa: F401  # which makes src/ importable

from data.rows import open_sources
from data.shapes import Example, Shapes
from data.shards import DataWriter, Document, open_prepared
from dataloader_instruct import ExampleStream, InstructData, Plan, Position
from instruct_format import encode_conversation
from model import GPT, GPTConfig, takes_packed
from training.memory import fit
from training.options import parse_options
from training.processes import Processes, join
from training.step import Learner, train_step
from training.threads import Saver
from weights import checkpoint

CONTEXT, SIZES, STEPS, SECONDS = 1024, (8, 32, 16, 4), 3, 150  # after which nothing more is begun
# Dense bf16 and fp16 products that are summed in fp32, in TFLOP/s: NVIDIA's data sheets, and for GeForce cards its
# architecture white papers (Turing, Ampere GA102, Ada, Blackwell), without sparsity. The first that fits counts.
PEAKS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989,
         "A100": 312, "A800": 312, "A40": 149.7, "A10G": 70, "A10": 125, "A30": 165, "L40S": 362, "L40": 181, "L4": 121,
         "V100-PCIE": 112, "V100": 125, "T4": 65, "RTX 6000 Ada": 364, "RTX A6000": 154.8, "RTX A5000": 111.1,
         "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090 Ti": 80, "RTX 3090": 71,
         "RTX 2080 Ti": 53.8}


class Measured(NamedTuple):
    tokens_per_second: float
    share: float | None  # of the card's peak
    wall_ms: float  # of a step
    gpu_ms: float  # of a step, in which the GPU computes
    cpu_ms: float  # of a step, to have its micro-batches under way
    peak_gb: float
    first_seconds: float  # of the first step, in which --compile compiles


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a card, or None where it is not known: in fp32, and of a part of a card."""
    is_known = dtype is not torch.float32 and not re.search("MIG|GRID", name)
    return next((peak * 1e12 for known, peak in PEAKS.items()
                 if is_known and re.search(rf"\b{known}(?!\w| Ti| SUPER| D\b| Laptop)", name)), None)


def write_data(dataset: str, folder: Path, n_tokens: int) -> InstructData:
    """The dataset's first examples, again and again until there are n_tokens."""
    rows = [row for _, row in Shapes({}).examples(open_sources([dataset], {})) if isinstance(row, Example)][:4000]
    pairs = [pair for pair in (encode_conversation(row.turns) for row in rows) if len(pair[0]) <= CONTEXT]
    writer, written = DataWriter(folder), 0
    while written < n_tokens:
        for tokens, mask in pairs:
            writer.add("train", Document(np.array(tokens, dtype=np.uint16), np.array(mask, dtype=np.uint8)))
            written += len(tokens)
    writer.add("val", Document(np.array(pairs[0][0], dtype=np.uint16), np.array(pairs[0][1], dtype=np.uint8)))
    writer.finish({"source": dataset})
    return InstructData(open_prepared(folder), "train", CONTEXT)


def flops(config: GPTConfig, data: InstructData, plan: Plan) -> float:
    """What the model's products of a step need, forward and backward, and nothing that is computed again.

    As in Chowdhery et al. 2022 (PaLM), appendix B: 6 for each weight that multiplies and token, and 12 L E T a token
    for attention over T tokens; half of that, as it is causal. The last layer's MLP and projection and the output layer
    count for the tokens only whose successor is trained, as the others do not pass them.
    """
    width, n_layer = config.n_embd, config.n_layer
    everywhere, at_responses = 12 * width**2 * (n_layer - 1) + 3 * width**2, (9 * width + config.vocab_size) * width
    squares = float(np.square(data.lengths[sum(plan.micro_batches, [])].astype(np.float64)).sum())
    return 6.0 * (plan.tokens * everywhere + plan.response_tokens * at_responses) + 6.0 * n_layer * width * squares


def learner_of(config: GPTConfig, processes: Processes, options: Namespace) -> Learner:
    """Random weights on the GPU, and what a run computes again where its memory is short."""
    model = GPT(config)
    model.init_weights(0)
    _, model.transformer.recompute = fit(options, model, processes)
    return Learner(model.to(processes.device), options, processes, print)


def plans(data: InstructData, size: int, options: Namespace) -> Iterator[Plan]:
    """Those of the steps of a run."""
    stream, position = ExampleStream(data.lengths, 1337, options.total_batch_size), Position()
    while True:
        examples, position = stream.step(position)
        yield data.plan(examples, size * CONTEXT, 1)


def launching(learner: Learner, data: InstructData, plan: Plan) -> float:
    """Seconds of the CPU until a step's micro-batches are under way: of one on an idle GPU, so that it does not wait,
    unless a micro-batch has more than a thousand launches, as without the packed kernel."""
    seconds = []
    for _, batch in zip(range(4), learner.batches(data, plan)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        learner.add_gradients(batch, 1.0 / plan.response_tokens)
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(seconds) * len(plan.micro_batches)


def computing(learner: Learner, data: InstructData, plan: Plan) -> float:
    """Milliseconds of a step in which the GPU computes: the sum of its kernels, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        train_step(learner, data, plan, 1e-5)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3


def measure(learner: Learner, data: InstructData, size: int, peak: float | None) -> Measured:
    """Medians of some steps, after a first one, and a second, at whose begin the optimizer's moments are new."""
    coming, begin = plans(data, size, learner.options), time.perf_counter()
    train_step(learner, data, next(coming), 1e-5)
    first, found = time.perf_counter() - begin, list[tuple[float, float, float]]()
    train_step(learner, data, next(coming), 1e-5)
    torch.cuda.reset_peak_memory_stats()
    for _, plan in zip(range(STEPS), coming):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        train_step(learner, data, plan, 1e-5)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        found.append((seconds, plan.tokens / seconds, flops(learner.model.config, data, plan) / seconds))
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    seconds, rate, speed = map(statistics.median, zip(*found))
    gpu_ms, cpu = computing(learner, data, next(coming)), launching(learner, data, next(coming))
    return Measured(rate, speed / peak if peak else None, 1e3 * seconds, gpu_ms, 1e3 * cpu, peak_gb, first)


def saving(learner: Learner, folder: Path) -> tuple[float, float]:
    """Seconds that training waits for a save, and until it is on the disk: the second of two, whose memory is there."""
    state = {"step": 1, "val_losses": [], "template": None, "model_config": vars(learner.model.config),
             "model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict()}
    saver, found = Saver(is_later=True), (0.0, 0.0)
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        saver.write(lambda copy: checkpoint.save(folder / "state.pt", copy), state)
        waited = time.perf_counter() - begin
        saver.wait()
        found = waited, time.perf_counter() - begin
    saver.close()
    return found


def profile(learner: Learner, data: InstructData, path: Path) -> None:
    """Where the time of a step goes: a table, and a trace that chrome://tracing and Perfetto show."""
    coming = plans(data, SIZES[0], learner.options)
    train_step(learner, data, next(coming), 1e-5)
    with torch.profiler.profile() as profiler:
        train_step(learner, data, next(coming), 1e-5)
    launches = sum(event.count for event in profiler.key_averages()
                   if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    print(f"\n{launches:,} launches in a step\n")
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60))
    profiler.export_chrome_trace(str(path))


def row(name: str, recompute: str, found: Measured) -> str:
    """A line of the table."""
    share = "-" if found.share is None else f"{100 * found.share:.1f} %"
    gpu = f"{found.gpu_ms:,.0f}" if found.gpu_ms else "-"  # where the profiler may not look
    return (f"{name} {found.tokens_per_second:,.0f} | {share} | {found.wall_ms:,.0f} | {gpu} | "
            f"{found.cpu_ms:,.0f} | {found.peak_gb:.2f} | {recompute} | {found.first_seconds:.1f} |")


def about(options: Namespace, learner: Learner, peak: float | None) -> None:
    """What the table is worth nothing without, and its head."""
    device = torch.cuda.get_device_properties(learner.processes.device)
    known = f"{peak / 1e12:,.0f} TFLOP/s" if peak else "not known"
    print(f"{time.strftime('%Y-%m-%d')}, {device.name}, {device.total_memory / 1e9:.0f} GB, PyTorch "
          f"{torch.__version__}, CUDA {torch.version.cuda}, GPT-2 {options.shape} in "
          f"{learner.product_type}, peak {known}\n\n"
          "| | mini_batch_size | tokens/s | of the peak | ms a step | of the GPU | of the CPU | GB at most | computed "
          "again | first step, s |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)


def compare(options: Namespace, folder: Path) -> None:
    """The table, a save, and the profile that was asked for."""
    begin, processes = time.perf_counter(), join("cuda")
    n_layer, n_head, n_embd = (int(number) for number in options.shape.split(","))
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    data, saved = write_data(options.dataset, folder / "data", (STEPS + 5) * 65536), (0.0, 0.0)
    for is_compiled, size in product((False, True), SIZES):
        flags = ["--context_length", CONTEXT, "--mini_batch_size", size, "--precision", options.precision]
        try:
            learner = learner_of(config, processes, parse_options([*map(str, flags), *["--compile"] * is_compiled]))
        except torch.OutOfMemoryError:
            return print(f"a model of --shape {options.shape} does not fit this GPU")
        peak = peak_of(torch.cuda.get_device_name(processes.device), learner.product_type)
        if not is_compiled and size == SIZES[0]:
            about(options, learner, peak)
        if is_compiled and not takes_packed(processes.device, learner.product_type, config.head_size):
            break
        name = f"| {'compiled' if is_compiled else 'as it is'} | {size} |"
        if time.perf_counter() - begin > SECONDS:
            print(f"{name} no time left |")
            continue
        try:
            print(row(name, learner.model.transformer.recompute, measure(learner, data, size, peak)), flush=True)
            if size == SIZES[0] and not is_compiled:
                saved = saving(learner, folder)
        except torch.OutOfMemoryError:
            print(f"{name} out of memory |", flush=True)
        del learner
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    print(f"\nA save: training waits {saved[0]:.2f} s, the file is there after {saved[1]:.2f} s.")
    if options.profile:
        flags = ["--context_length", CONTEXT, "--precision", options.precision, "--compile"]
        profile(learner_of(config, processes, parse_options([*map(str, flags)])), data, options.profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True, help="a file with examples")
    parser.add_argument("--shape", default="12,12,768", help="layers,heads,width (default: %(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--profile", type=Path, help="write a trace of a compiled step there, and print its table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU that PyTorch can use")
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
