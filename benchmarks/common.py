"""What the benchmarks share: workers that take turns, medians of ratios, the machine's name."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))


class Worker:
    """A process that measures one thing each time it is told to, so that several can take turns."""

    def __init__(self, script: str, *arguments: str, threads: int = os.cpu_count() or 1) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, script, "--worker", *arguments], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)

    def measure(self) -> dict[str, Any]:
        """One measurement: {"units": ..., "seconds": ..., "peak_bytes": ...}."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"units"'):
                return json.loads(line)
        raise SystemExit(f"a worker left with exit code {self.process.wait()}")

    def close(self) -> None:
        self.process.communicate()


def report(units: float, seconds: float) -> None:
    """A worker's answer. Memory is the peak of this process so far (ru_maxrss would count the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"units": units, "seconds": seconds, "peak_bytes": peak}), flush=True)


def clock() -> Callable[[], float]:
    """Seconds; where there is one thread those of the processor, which depend less on what else the machine does."""
    return time.process_time if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter


def serve(work: Callable[[], float]) -> None:
    """Measure work, which returns how many units it did, each time the parent asks."""
    for _ in sys.stdin:
        begin = clock()()
        units = work()
        report(units, clock()() - begin)


def take_turns(workers: dict[str, Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """A B A B ...: every worker measures once a round; a first round warms up and is not counted."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            result = worker.measure()
            if number:
                results[name].append(result)
    for worker in workers.values():
        worker.close()
    return results


def rate(results: list[dict[str, Any]]) -> float:
    """Median units a second."""
    return statistics.median(result["units"] / result["seconds"] for result in results)


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Of the rates, round by round: median, smallest, largest."""
    ratios = [a["units"] / a["seconds"] / (b["units"] / b["seconds"]) for a, b in zip(ours, theirs)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_gb(results: list[dict[str, Any]]) -> float:
    return max(result["peak_bytes"] for result in results) / 1e9


def machine() -> str:
    """Date, processor and versions: what a figure is worth nothing without."""
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    return f"{time.strftime('%Y-%m-%d')}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, " \
           f"PyTorch {torch.__version__}"


def compare(script: str, folder: str, pairs: dict[str, str], unit: str, threads: int, rounds: int) -> None:
    """Measure each peer in turn with what of ours it is compared with, and print a table."""
    print(f"\n{machine()}")
    print(f"| peer | peer, {unit} | ours | {unit} | ours / peer (min to max) | peer GB | ours GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for peer, us in pairs.items():
        found = take_turns({name: Worker(script, name, folder, threads=threads) for name in (us, peer)}, rounds)
        middle, low, high = ratio(found[us], found[peer])
        print(f"| {peer} | {rate(found[peer]):.1f} | {us} | {rate(found[us]):.1f} | {middle:.2f} ({low:.2f} to "
              f"{high:.2f}) | {peak_gb(found[peer]):.1f} | {peak_gb(found[us]):.1f} |", flush=True)
