"""What the fault measurements share: inputs, running the trainer in the background, and what must hold afterwards."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock

from conftest import ROOT, SRC
from helpers import random_examples, resume_flags, same_state, small_model, trajectory, write_data, write_pretrained
from model import GPTConfig
from weights import checkpoint

STEPS = 24
FINAL = f"step_{STEPS:06d}.pt"
WIDE = GPTConfig(context_length=1024, vocab_size=1009, n_layer=2, n_head=2, n_embd=128)  # a state of 8 MB


@dataclass
class Result:
    """What was tried, and what did not hold."""

    tried: str
    count: int = 0
    failures: list[str] = field(default_factory=list)
    notes: str = ""

    def check(self, name: str, *complaints: str) -> None:
        """Count a case; the complaints that are not empty make it a failure."""
        self.count += 1
        found = "; ".join(complaint for complaint in complaints if complaint)
        if found:
            self.failures.append(f"{name}: {found}")
            print(f"    {name}: {found}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        held = f"{self.count - len(self.failures)} of {self.count} held"
        return f"{self.tried}: {held}" + f" ({self.notes})" * bool(self.notes)


class Lab:
    """A folder with data, a pre-trained model, the undisturbed run of it for 1 and 2 processes, and room for others."""

    def __init__(self, folder: Path, config: GPTConfig | None = None) -> None:
        self.folder, self._runs, self._lock = folder, count(1), Lock()
        examples = {"train": random_examples(60, 64), "val": random_examples(15, 64, seed=1)}
        self.data = write_data(folder / "data", examples)
        self.pretrained = write_pretrained(folder / "pretrained.pt", small_model(config=config) if config
                                           else small_model())
        self.step_bytes = 3 * self.pretrained.stat().st_size  # nearly
        self._whole: dict[int, Path] = {}
        self.faulty = folder / "src"  # src/ with another trainer: the launcher starts the one of its own folder
        self.faulty.mkdir()
        for path in SRC.iterdir():
            trainer = path.name == "train_instruct.py"
            (self.faulty / path.name).symlink_to(ROOT / "tests" / "faults_trainer.py" if trainer else path)

    def new_folder(self) -> Path:
        return self.folder / f"run{next(self._runs)}"

    def flags(self, *more: object) -> list[str]:
        return [*resume_flags(self.data, self.pretrained), *map(str, more)]

    def whole(self, processes: int) -> Path:
        """The last checkpoint of an undisturbed run."""
        with self._lock:
            if processes not in self._whole:
                run = Trainer(self, self.new_folder(), processes, self.flags("--checkpoint_freq", 100))
                assert run.wait() == 0, run.output()
                self._whole[processes] = run.folder / FINAL
        return self._whole[processes]

    def differs(self, run_folder: Path, processes: int) -> str:
        """A complaint unless the run's end is the undisturbed run's end, to the bit, and left no temporary file."""
        if not (run_folder / FINAL).exists():
            return "it has no end"
        equal = same_state(trajectory(run_folder / FINAL), trajectory(self.whole(processes)))
        left = [path.name for path in run_folder.glob("*.tmp")]
        return "another end" * (not equal) + f" left {left}" * bool(left)


class Trainer:
    """The trainer in the background: one process, or launch.py with several; its output goes to a file."""

    def __init__(self, lab: Lab, folder: Path, processes: int, flags: list[str], fault: dict | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.processes = folder, processes
        self.log = folder / f"output{len(list(folder.glob('output*')))}"
        source = lab.faulty if fault else SRC
        script = [source / "train_instruct.py"] if processes == 1 else ["-m", "training.launch", processes]
        command = [sys.executable, *script, *flags, "--checkpoint_dir", folder, "--tensorboard_dir", folder / "tb"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault or {}), "FAULT_SRC": str(SRC),
                       "PYTHONPATH": str(source)}
        self.begin = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(part) for part in command], cwd=lab.folder, stdout=log, stderr=log,
                                            env=environment)

    def wait(self, timeout: float = 120) -> int:
        """The exit code; a process that does not end is killed and counts as -99."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in (*self.ranks(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            return -99

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The last step that it told of."""
        return max((int(number) for number in re.findall(rf"^step (\d+)/{STEPS} ", self.output(), re.M)), default=0)

    def saved(self) -> list[int]:
        return [int(number) for number in re.findall(r"^saved .*step_(\d+)\.pt$", self.output(), re.M)]

    def ranks(self) -> list[int]:
        """The training processes, rank 0 first: this one, or the launcher's children."""
        return [self.process.pid] if self.processes == 1 else sorted(children(self.process.pid))


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def orphans(folder: Path) -> str:
    """A complaint when a process that was started for this folder still runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{folder}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return f"{len(found)} processes are left" if found else ""


def newest(folder: Path) -> int:
    """The step of the newest valid checkpoint, 0 when there is no checkpoint at all."""
    if not any(folder.glob("step_*.pt")):
        return 0
    return checkpoint.newest_valid(folder, lambda _: None)[1]["step"]


def wait_for(condition: object, run: Trainer, seconds: float = 60) -> bool:
    """Wait until the condition holds; False when the run ends before."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if run.process.poll() is not None or time.monotonic() > end:
            return bool(condition())
        time.sleep(0.002)
    return True


@contextmanager
def lab(shared: Lab | None = None, config: GPTConfig | None = None) -> Iterator[Lab]:
    """A laboratory of one's own, or one that is shared, which stays."""
    if shared:
        yield shared
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Lab(Path(folder), config)
