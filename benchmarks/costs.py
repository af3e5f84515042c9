"""What surrounds the arithmetic: start-up, data preparation, checkpoints. Whole commands, in turn with their yardstick.

    python benchmarks/costs.py [start] [preparation] [checkpoint] [memory] --dataset FILE [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, machine

SRC = ROOT / "src"
PYTHON = sys.executable
EXAMPLES = 52_002


def seconds(command: list[str], until: str | None = None) -> float:
    """Wall time of a command, or of its first line of output that begins with until."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout
    for line in process.stdout:
        if until and line.startswith(until):
            elapsed = time.perf_counter() - begin
            process.kill()
            process.communicate()
            return elapsed
    if process.wait():
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - begin


def turns(measured: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of seconds, measured A B C A B C ... after one round that warms the file cache."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 1):
        for name, measure in measured.items():
            value = measure()
            if number:
                found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f} to {max(values):.2f} |", flush=True)
    return medians


def repeated(dataset: Path, folder: Path, count: int) -> Path:
    """The dataset's rows again and again, each with a number of its own, so that none is a repeat."""
    rows = json.loads(dataset.read_text())
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} ({number})"}) + "\n")
    return path


def prepare(source: Path, folder: Path) -> list[str]:
    return [PYTHON, str(SRC / "prepare_instruct_dataset.py"), "--dataset", str(source), "--output_dir", str(folder)]


def start(folder: Path, dataset: Path, rounds: int) -> None:
    from instruct_format import TEMPLATE
    from model import GPT, GPTConfig
    from weights.checkpoint import save

    model = GPT(GPTConfig())
    model.init_weights(0)
    state = {"step": 1, "val_losses": [], "model_config": vars(model.config), "model": model.state_dict()}
    save(folder / "tuned.pt", {**state, "template": TEMPLATE})
    save(folder / "pretrained.pt", {**state, "template": None})
    del model, state
    seconds(prepare(repeated(dataset, folder, EXAMPLES), folder / "data"))
    chat = [PYTHON, str(SRC / "chat.py"), "--checkpoint", str(folder / "tuned.pt"), "--prompt", "Hello", "--seed", "1",
            "--max_new_tokens", "1"]
    train = [PYTHON, str(SRC / "train_instruct.py"), "--pretrained_model", str(folder / "pretrained.pt"), "--data_dir",
             str(folder / "data"), "--tensorboard_dir", str(folder / "runs"), "--device", "cpu"]
    count = iter(range(1000))
    medians = turns({
        "import torch": lambda: seconds([PYTHON, "-c", "import torch"]),
        "chat.py, 124M, to the end of its first token": lambda: seconds(chat),
        "chat.py --quantize int8": lambda: seconds([*chat, "--quantize", "int8"]),
        "train_instruct.py, 124M, 52k examples, until its first step begins": lambda: seconds(
            [*train, "--checkpoint_dir", str(folder / f"run{next(count)}")], until="run "),
        "train_instruct.py --help": lambda: seconds([PYTHON, str(SRC / "train_instruct.py"), "--help"]),
    }, rounds)
    base = medians["import torch"]
    print("beyond import torch: " + ", ".join(f"{name} {value - base:.2f} s" for name, value in medians.items()
                                              if value > base))


def preparation(folder: Path, dataset: Path, rounds: int) -> None:
    source = repeated(dataset, folder, EXAMPLES)
    tiktoken_alone = (
        "import json, os, sys, time; sys.path.insert(0, 'src')\n"
        "from instruct_format import prompt_text, tokenizer\n"
        f"rows = [json.loads(line) for line in open({str(source)!r})]\n"
        "texts = [t for r in rows for t in (prompt_text(r['instruction'], r['input']), r['output'].strip())]\n"
        "tokenizer(); begin = time.perf_counter()\n"
        "tokenizer().encode_ordinary_batch(texts, num_threads=os.cpu_count())\n"
        "print(time.perf_counter() - begin)")

    def alone() -> float:
        return float(subprocess.run([PYTHON, "-c", tiktoken_alone], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout)

    medians = turns({"tiktoken alone, 52k examples": alone,
                     "prepare_instruct_dataset.py, whole command": lambda: seconds(prepare(source, folder / "out"))},
                    rounds)
    ours, theirs = medians["prepare_instruct_dataset.py, whole command"], medians["tiktoken alone, 52k examples"]
    print(f"ratio {ours / theirs:.2f}")


def memory(folder: Path, _: Path, __: int) -> None:
    """The most that preparation takes, with short rows: what grows is one digest a row."""
    peak = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)")
    for count in (100_000, 1_000_000, 5_000_000):
        source = folder / f"{count}.jsonl"
        with source.open("w") as file:
            for number in range(count):
                file.write(f'{{"instruction": "What comes after {number}?", "input": "", "output": "{number + 1}"}}\n')
        command = [PYTHON, "-c", peak, *prepare(source, folder / "out")]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"| {count:,} rows, MiB at most | {found.strip()} | |", flush=True)
        source.unlink()


def checkpoint(folder: Path, _: Path, rounds: int) -> None:
    import torch

    from model import GPT, GPTConfig
    from training.options import parse_options
    from training.processes import Processes
    from training.step import Learner
    from weights.checkpoint import LATEST, save_step

    model = GPT(GPTConfig())
    model.init_weights(0)
    optimizer = Learner(model, parse_options([]), Processes(0, 1, torch.device("cpu"))).optimizer
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    step = iter(range(1, 1000))

    def ours() -> float:
        state = {"step": next(step), "val_losses": [], "template": None, "model_config": vars(model.config),
                 "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        begin = time.perf_counter()
        save_step(folder, state, keep_last=1)  # training waits for all of it, the removal of the older file too
        return time.perf_counter() - begin

    def dd() -> float:
        return seconds(["dd", f"if={folder / LATEST}", f"of={folder / 'copy'}", "bs=4M", "conv=fsync"])

    medians = turns({"save_step, 1.5 GB": ours, "dd conv=fsync, the same bytes": dd}, rounds)
    print(f"ratio {medians['save_step, 1.5 GB'] / medians['dd conv=fsync, the same bytes']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["start", "preparation", "checkpoint"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", type=Path, required=True, help="Alpaca-style JSON")
    options = parser.parse_args()
    for name in options.what:
        print(f"\n{machine()}\n| {name} | seconds | min to max |\n|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            {"start": start, "preparation": preparation, "checkpoint": checkpoint,
             "memory": memory}[name](
                Path(folder), options.dataset, options.rounds)


if __name__ == "__main__":
    main()
