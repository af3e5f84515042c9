"""What the fault measurements share: inputs, running the trainer in the background, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from conftest import ROOT, SRC
from helpers import resume_flags, run_inputs, trajectory
from model import GPTConfig
from models import SMALL, same_state
from weights import checkpoint

STEPS = 24
FINAL = f"step_{STEPS:06d}.pt"
WIDE = GPTConfig(context_length=1024, vocab_size=1009, n_layer=2, n_head=2, n_embd=128)  # a state of 8 MB
RESUME = ["--resume", "latest"]


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
        if found := "; ".join(complaint for complaint in complaints if complaint):
            self.failures.append(f"{name}: {found}")
            print(f"    {name}: {found}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        right = f"{self.count - len(self.failures)} of {self.count} as they should be"
        return f"{self.tried}: {right}" + f" ({self.notes})" * bool(self.notes)


def measurement(tried: str, config: GPTConfig = SMALL) -> Callable[[Callable[..., None]], Callable[..., Result]]:
    """Makes measure(result, lab, ...) a function of the rest that returns the result. Its laboratory, with a model of
    this configuration, is its own, unless it is called with one to share."""
    def decorate(measure: Callable[..., None]) -> Callable[..., Result]:
        def measured(*arguments: Any, shared: Lab | None = None, **keywords: Any) -> Result:
            result = Result(tried)
            with tempfile.TemporaryDirectory() as folder:
                measure(result, shared or Lab(Path(folder), config), *arguments, **keywords)
            return result
        return measured
    return decorate


class Lab:
    """A folder with data, a pre-trained model, the undisturbed run of it for 1 and 2 processes, and room for others."""

    def __init__(self, folder: Path, config: GPTConfig = SMALL) -> None:
        self.folder, self._runs, self._lock = folder, count(1), Lock()
        self.data, self.pretrained = run_inputs(folder, config)
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

    def start(self, processes: int, *more: object, **fault: Any) -> Trainer:
        """A new run with the usual flags and more; the fault is for faults_trainer.py."""
        return Trainer(self, self.new_folder(), processes, self.flags(*more), fault)

    def whole(self, processes: int) -> Path:
        """The last checkpoint of an undisturbed run."""
        with self._lock:
            if processes not in self._whole:
                run = self.start(processes, "--checkpoint_freq", 100)
                assert run.wait() == 0, run.output()
                self._whole[processes] = run.folder / FINAL
        return self._whole[processes]


class Trainer:
    """The trainer in the background: one process, or launch.py with several; its output goes to a file. Some faults
    concern the start: launcher, for one process too; nohup; quiet and grace, as seconds in launch.py."""

    def __init__(self, lab: Lab, folder: Path, processes: int, flags: list[str], fault: dict | None = None,
                 before: Sequence[str] = (), **variables: str) -> None:
        """before: a command that starts it; variables: more of its environment."""
        folder.mkdir(exist_ok=True)
        fault = fault or {}
        self.lab, self.folder, self.processes, self.flags = lab, folder, processes, flags
        self.log, self.marker = folder / f"output{len(list(folder.glob('output*')))}", f"{folder}.marker"
        source = lab.faulty if fault else SRC
        self.direct = processes == 1 and not fault.get("launcher")
        script = [source / "train_instruct.py"] if self.direct else ["-m", "training.launch", processes]
        if times := [f"l.{name.upper()} = {fault[name]}; " for name in ("quiet", "grace") if name in fault]:
            script = ["-c", f"import cli, training.launch as l; {''.join(times)}cli.run(l.main)", processes]
        command = [*before, *["nohup"] * fault.get("nohup", 0), sys.executable, *script, "--checkpoint_dir", folder,
                   "--tensorboard_dir", folder / "tb", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source),
                       "FAULT": json.dumps({**fault, "marker": self.marker}), **variables}
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

    def wait_for(self, condition: Callable[[Trainer], object], seconds: float = 60) -> None:
        """Wait until the condition holds or the run ends."""
        end = time.monotonic() + seconds
        while not condition(self) and self.process.poll() is None and time.monotonic() <= end:
            time.sleep(0.002)

    def shows(self, text: str, seconds: float = 60) -> bool:
        """Wait until this stands in the output."""
        self.wait_for(lambda run: text in run.output(), seconds)
        return text in self.output()

    def again(self, flags: list[str] = RESUME) -> Trainer:
        return Trainer(self.lab, self.folder, self.processes, flags)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, start: str) -> list[str]:
        return [line for line in self.output().splitlines() if line.startswith(start)]

    def step(self) -> int:
        """The last step that it named."""
        return max((int(number) for number in re.findall(rf"^step (\d+)/{STEPS} ", self.output(), re.M)), default=0)

    def saved(self) -> list[int]:
        return [int(number) for number in re.findall(r"^saved .*step_(\d+)\.pt$", self.output(), re.M)]

    def stopped(self) -> bool:
        """Whether its fault has begun on rank 0."""
        return os.path.exists(f"{self.marker}.0")

    def ranks(self) -> list[int]:
        """The training processes, rank 0 first: this one, or the launcher's children."""
        own = self.process.pid
        return [own] if self.direct else sorted(
            processes("stat", lambda stat: int(stat.rpartition(b")")[2].split()[1]) == own))

    def exits(self, *wanted: int) -> str:
        """A complaint unless it ends with one of these exit codes."""
        code = self.wait()
        return f"exit {code}: {self.output()[-300:]}" * (code not in wanted)

    def differs(self) -> str:
        """A complaint unless the run's end is the undisturbed run's end, to the bit, and left no temporary file."""
        if not (self.folder / FINAL).exists():
            return "it has no end"
        equal = same_state(trajectory(self.folder / FINAL), trajectory(self.lab.whole(self.processes)))
        left = [path.name for path in self.folder.glob("*.tmp")]
        return "another end" * (not equal) + f" left {left}" * bool(left)

    def goes_on(self, flags: list[str] = RESUME) -> list[str]:
        """Complaints unless the run, started again, gets to the undisturbed run's end."""
        return [f"resumed: {wrong}" if (wrong := self.again(flags).exits(0)) else "", self.differs()]

    def orphans(self) -> str:
        """A complaint when a process that was started for this folder still runs; it is killed."""
        found = processes("cmdline", lambda command: f"{self.folder}\0".encode() in command)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return f"{len(found)} processes are left" if found else ""


def processes(file: str, wanted: Callable[[bytes], bool]) -> list[int]:
    """The processes of this machine whose /proc/PID/file is as wanted."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        with suppress(OSError):  # it has ended
            if wanted(path.read_bytes()):
                found.append(int(path.parent.name))
    return found


def newest(folder: Path) -> int:
    """The step of the newest valid checkpoint, 0 when there is no checkpoint at all."""
    if not any(folder.glob("step_*.pt")):
        return 0
    return checkpoint.newest_valid(folder, lambda _: None)[1]["step"]
