"""Start the training processes of this host, and leave with the run's exit code:

    python -m training.launch NPROC [trainer flags...]

When a process dies, all are started again and go on from the newest checkpoint. What a trainer itself decided, an error
of the user's for instance, is final. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the trainers, which take the
time they need to save; a second one ends them. On several machines run this on each, with torchrun's flags in
TORCHRUN_FLAGS; see hosts.py. On one machine nothing listens beyond loopback, and a single process needs no connection.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cli import Parser, printable_line, run, say
from errors import DiedError, LostError, UserError, errors_at
from training.ending import AGAIN, WATCHED_SIGNALS, Signals, block_signals
from training.hosts import Hosts, Leader, Plan, Report, name_of
from training.options import parse_options
from weights.durable import lock_folder

GRACE = 5.0  # seconds to end in, for processes that another one has left alone
NOTICE, PATIENCE = 8.0, 600.0  # seconds to wait for other hosts before that is said, and in all
QUIET = 600.0  # seconds without a step before that is said
TRAINER = Path(__file__).parent.parent / "train_instruct.py"


def main() -> int:
    block_signals()
    most_processes = max(8, os.cpu_count() or 1)
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or not 1 <= int(sys.argv[1]) <= most_processes:
        raise UserError(f"the first argument is the number of processes, 1 to {most_processes} on this machine")
    processes, flags = int(sys.argv[1]), sys.argv[2:]
    options = parse_options(flags)
    folder = Path(options.checkpoint_dir)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    least, most, endpoint, restarts = _machines(os.environ.get("TORCHRUN_FLAGS", ""))
    if endpoint:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of addresses that have no name
    elif not options.dry_run:
        with lock_folder(folder):
            pass  # refused before any process is started if a run goes on there
    with tempfile.TemporaryDirectory() as temporary:
        hosts = Hosts(endpoint, Leader(least, most, folder / "latest.pt", restarts), Report(processes))
        return Launcher(processes, flags, temporary, hosts).run()


def _machines(text: str) -> tuple[int, int, tuple[str, int] | None, int]:
    """From torchrun's flags: the least and the most machines, where several meet, and how often a run is started again.
    """
    parser = Parser()
    for name, default in (("nnodes", "1"), ("rdzv_endpoint", ""), ("max_restarts", "3"), ("rdzv_backend", ""),
                          ("rdzv_id", ""), ("node_rank", "")):  # the last three of them change nothing
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=default)
    with errors_at("TORCHRUN_FLAGS", ValueError):
        flags = parser.parse_args(shlex.split(text))
        least, most = (int(number) for number in f"{flags.nnodes}:{flags.nnodes}".split(":")[:2])
        host, _, port = flags.rdzv_endpoint.partition(":")
        endpoint = (host, int(port or 29500))
        if not 1 <= least <= most:
            raise ValueError("--nnodes takes a number of machines such as 2, or the least and the most such as 1:4")
        if most > 1 and not host:
            raise ValueError("several machines need a place to meet, such as --rdzv_endpoint=node1:29500")
        return least, most, endpoint if most > 1 else None, int(flags.max_restarts)


class Trainers:
    """The training processes of this host in one start of the run."""

    def __init__(self) -> None:
        self.by_rank: dict[int, subprocess.Popen[bytes]] = {}
        self.killed: set[int] = set()  # the ranks that were ended from here
        self.end = math.inf  # when those that still run are killed

    def send(self, number: int) -> None:
        for trainer in self.by_rank.values():
            if trainer.poll() is None:
                trainer.send_signal(number)

    def kill(self) -> None:
        self.killed |= {rank for rank, trainer in self.by_rank.items() if trainer.poll() is None}
        self.send(signal.SIGKILL)
        for trainer in self.by_rank.values():
            trainer.wait()

    def end_soon(self) -> None:
        """They have some seconds to end by themselves."""
        self.end = min(self.end, time.monotonic() + GRACE)

    def outcome(self, stop: int) -> tuple[int, str] | None:
        """How they ended, as one exit code and a reason: what a trainer decided comes first, then a death. None while
        one of them runs. stop is the signal that asked them to stop, or 0."""
        codes = {rank: trainer.poll() for rank, trainer in self.by_rank.items()}
        if any(code not in (None, 0, 128 + stop) for code in codes.values()):
            self.end_soon()  # the others are left alone
        if None in codes.values():
            if time.monotonic() >= self.end:
                self.kill()
            return None
        ended = {rank: code for rank, code in codes.items() if code and rank not in self.killed}
        for code in ended.values():
            if code > 1 and code not in (LostError.exit_code, 128 + AGAIN):
                return code, ""
        if stop and (self.killed or ended):
            return 128 + stop, ""
        names = {-number: f"was killed ({number.name})" for number in signal.Signals} | {1: "failed"}
        names[-signal.SIGKILL] += ", often because memory ran out"
        died = [f"process {rank} {names.get(code, f'was killed ({-code})')}" for rank, code in ended.items()
                if code < 0 or code == 1]
        return (DiedError.exit_code if died else LostError.exit_code if self.killed or ended else 0), ", ".join(died)


class Launcher:
    """What this host does in a run, from its first start to its end."""

    def __init__(self, processes: int, flags: list[str], folder: str, hosts: Hosts) -> None:
        self.flags, self.folder, self.hosts = flags, folder, hosts
        self.report, self.trainers, self.signals = Report(processes), Trainers(), Signals()
        self.begun = Path(folder, "begun")  # the trainers touch it when they begin, and at every step
        self.news = ""  # what was said of the plan
        self.since, self.notice = time.monotonic(), NOTICE  # when waiting began, and the seconds before that is said

    def run(self) -> int:
        """Do what the plan says until the run is over. Returns or raises its exit code."""
        code = DiedError.exit_code
        try:
            while True:
                if received := signal.sigtimedwait(WATCHED_SIGNALS, 0.1):
                    if self.signals.note(received.si_signo):
                        self.trainers.kill()
                    self.trainers.send(received.si_signo)
                if self.report.code is None and (outcome := self.trainers.outcome(self.signals.stop)):
                    self.report = replace(self.report, code=outcome[0], why=outcome[1])
                    self.since, self.notice = time.monotonic(), NOTICE
                plan = self.hosts.decide(self.report)
                if plan.code is None and plan.news not in ("", self.news):
                    self.news = plan.news
                    say(printable_line(f"warning: {plan.news}"))
                    if plan.saving:
                        self.trainers.send(AGAIN)
                if self.report.code is None:
                    self._watch(plan)
                elif plan.code is not None or self.signals.stop:
                    code = 128 + self.signals.stop if plan.code is None else plan.code
                    return self._show_end(plan, code)
                elif plan.goes and self.hosts.key in plan.members and plan.start > self.report.start:
                    self._start(plan)
                else:
                    self._wait(plan.waiting or "a place among the hosts of the run")
        finally:
            self.trainers.kill()
            self.hosts.leave(code)

    def _start(self, plan: Plan) -> None:
        # a start of this command that has begun has obeyed --resume; so has one that another host knows of
        if self.begun.exists() or (plan.start > 1 and not self.report.start):
            self.begun.touch()
        store = f"file://{self.folder}/store{plan.start}"
        if self.hosts.endpoint:
            store = "tcp://{}:{}/{}".format(*self.hosts.endpoint, plan.start)
        else:
            os.environ |= {f"{library}_SOCKET_IFNAME": "lo" for library in ("GLOO", "NCCL")}
        keys = list(plan.members)
        first = sum(plan.members[key] for key in keys[:keys.index(self.hosts.key)])
        self.trainers, self.notice = Trainers(), QUIET
        self.report = replace(self.report, start=plan.start, code=None)
        for local_rank in range(self.report.processes):
            environment = {"RANK": first + local_rank, "LOCAL_RANK": local_rank,
                           "WORLD_SIZE": sum(plan.members.values()), "LOCAL_WORLD_SIZE": self.report.processes,
                           "INSTRUCT_STORE": store, "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is there
                           "INSTRUCT_SAID": f"{self.folder}/said{plan.start}", "INSTRUCT_BEGUN": self.begun}
            self.trainers.by_rank[first + local_rank] = subprocess.Popen(
                [sys.executable, str(TRAINER), *self.flags],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}})

    def _watch(self, plan: Plan) -> None:
        """The trainers run: have them end unless the plan is that they go on, and say when nothing happens."""
        if plan.start != self.report.start or not (plan.goes or plan.saving):
            self.trainers.end_soon()
        seconds = time.time() - self.begun.stat().st_mtime if self.begun.exists() else 0.0
        if seconds >= self.notice:
            self.notice = 2 * seconds
            say(f"warning: no step has ended for {seconds / 60:.0f} minutes; if a process hangs, Ctrl-C twice ends the "
                "run, and latest goes on from its newest checkpoint")

    def _wait(self, what: str) -> None:
        """Nothing runs here: say what it waits for, but do not wait for ever."""
        waited = time.monotonic() - self.since
        if waited >= PATIENCE:
            raise DiedError(f"waited {PATIENCE:.0f} s for {what}")
        if waited >= self.notice:
            self.notice = 2 * waited
            say(printable_line(f"{name_of(self.hosts.key)}: waiting for {what}, {PATIENCE - waited:.0f} s more"))

    def _show_end(self, plan: Plan, code: int) -> int:
        """Returns the exit code. Raises the error that ended the run, unless a trainer of this host has shown it."""
        if plan.code and plan.news and (code != self.report.code or code == DiedError.exit_code):
            error = UserError(plan.news)
            error.exit_code = code
            raise error
        return code


if __name__ == "__main__":
    run(main, os._exit)  # the thread that talks to torch's store would not survive the interpreter's own end
