"""Start the training processes of this host, and leave with the run's exit code:

    PYTHONPATH=src python -m training.launch NPROC [trainer flags...]

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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cli import Parser, number, printable_line, run, say, usable_cpus
from errors import DiedError, LostError, UserError, errors_at
from training.ending import AGAIN, WATCHED_SIGNALS, Signals, block_signals
from training.hosts import Hosts, Leader, Plan, Report, name_of
from training.options import parse_options
from weights.durable import LOCK, TEMPORARY_SUFFIX, lock_folder

GRACE, SAVING = 5.0, 120.0  # seconds to end in, for processes that another one has left alone; more, for a save
NOTICE, PATIENCE = 8.0, 600.0  # seconds to wait for other hosts before that is said, and in all
QUIET = 600.0  # seconds without a step before that is said
NAMES = {number.value: number.name for number in signal.Signals}
TRAINER = Path(__file__).parent.parent / "train_instruct.py"


def main() -> int:
    block_signals()
    parser, flags = Parser(), sys.argv[2:]
    parser.add_argument("nproc", type=number(int, 1, max(8, os.cpu_count() or 1)), help="the number of processes")
    processes = parser.parse_args(sys.argv[1:2]).nproc
    options = parse_options(flags)
    folder = Path(options.checkpoint_dir)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))
    least, most, endpoint, restarts = _machines(os.environ.get("TORCHRUN_FLAGS", ""))
    if endpoint:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of addresses that have no name
    elif not options.dry_run and (folder / LOCK).exists():
        with lock_folder(folder):
            pass  # refused before any process is started if a run goes on there
    with tempfile.TemporaryDirectory() as temporary:
        hosts = Hosts(endpoint, Leader(least, most, folder / "latest.pt", restarts), Report(processes))
        return Launcher(flags, temporary, hosts).run()


def _machines(text: str) -> tuple[int, int, tuple[str, int] | None, int]:
    """From torchrun's flags: the least and the most machines, where several meet, and how often a run is started again.
    """
    parser = Parser()
    for name, default in (("nnodes", "1"), ("rdzv_endpoint", ""), ("max_restarts", "3"), ("rdzv_backend", ""),
                          ("rdzv_id", ""), ("node_rank", "")):  # the last three of them change nothing
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=default)
    with errors_at("TORCHRUN_FLAGS", ValueError):
        flags, unknown = parser.parse_known_args(shlex.split(text))
        if unknown:
            raise ValueError(f"{unknown[0]}: it takes --nnodes, --rdzv_endpoint and --max_restarts")
        least, most = (int(number) for number in f"{flags.nnodes}:{flags.nnodes}".split(":")[:2])
        host, _, port = flags.rdzv_endpoint.partition(":")
        endpoint = (host, int(port or 29500))
        if not 1 <= least <= most:
            raise ValueError("--nnodes takes a number of machines such as 2, or the least and the most such as 1:4")
        if most > 1 and not host:
            raise ValueError("several machines need a place to meet, such as --rdzv_endpoint=node1:29500")
        return least, most, endpoint if most > 1 else None, int(flags.max_restarts)


class Launcher:
    """What this host does in a run, from its first start to its end."""

    def __init__(self, flags: list[str], folder: str, hosts: Hosts) -> None:
        self.flags, self.folder, self.hosts = flags, folder, hosts
        self.report, self.signals = hosts.report, Signals()
        self.trainers: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self.killed = set[int]()  # the ranks that were ended from here
        self.end = self.last_end = math.inf  # when those that still run are to be ended; in the middle of a save too
        self.begun = Path(folder, "begun")  # the trainers touch it when they begin, and at every step
        self.news = ""  # what was said of the plan
        self.since, self.notice = time.monotonic(), NOTICE  # when waiting began, and the seconds before that is said

    def run(self) -> int:
        """Do what the plan says until the run is over. Returns or raises its exit code."""
        try:
            while True:
                time.sleep(0.1)  # not sigtimedwait: if Ctrl-Z and fg come meanwhile, it returns what nobody sent
                received = signal.sigtimedwait(WATCHED_SIGNALS, 0)
                if received and received.si_signo != AGAIN:  # which only comes from here
                    if self.signals.note(received.si_signo):
                        self._kill()
                    self._send(received.si_signo)
                plan = self.hosts.decide(self.report)
                if plan.code is None and plan.news not in ("", self.news):
                    self.news = plan.news
                    say(printable_line(f"warning: {plan.news}"))
                    if plan.saving:
                        self._send(AGAIN)
                if self.report.code is None:
                    self._watch(plan)
                elif plan.code is not None:
                    return self._exit_code(plan.code, plan.news)
                elif self.signals.stop:
                    return 128 + self.signals.stop
                elif plan.goes and self.hosts.key in plan.members and plan.start > self.report.start:
                    self._start(plan)
                else:
                    self._wait(plan.waiting or "a place among the hosts of the run")
        finally:
            self._kill()
            self.hosts.leave(128 + self.signals.stop if self.signals.stop else DiedError.exit_code)

    def _start(self, plan: Plan) -> None:
        # a start of this command that has begun has obeyed --resume; so has one that another host knows of
        if self.begun.exists() or (plan.start > 1 and not self.report.start):
            self.begun.touch()
        store = f"file://{self.folder}/store{plan.start}"
        if self.hosts.endpoint:
            os.environ |= zip(("MASTER_ADDR", "MASTER_PORT"), map(str, self.hosts.endpoint))
            store = f"env://{plan.start}"
        else:
            os.environ |= {f"{library}_SOCKET_IFNAME": "lo" for library in ("GLOO", "NCCL")}
        counts = list(plan.members.values())
        first = sum(counts[:list(plan.members).index(self.hosts.key)])
        self.trainers, self.killed, self.end, self.last_end, self.notice = {}, set(), math.inf, math.inf, QUIET
        self.report = replace(self.report, start=plan.start, code=None)
        for local_rank in range(self.report.processes):
            environment = {"RANK": first + local_rank, "LOCAL_RANK": local_rank,
                           "WORLD_SIZE": sum(counts), "LOCAL_WORLD_SIZE": self.report.processes,
                           "INSTRUCT_STORE": store, "TORCHELASTIC_USE_AGENT_STORE": True,  # no trainer makes it
                           "INSTRUCT_SAID": f"{self.folder}/said{plan.start}", "INSTRUCT_BEGUN": self.begun}
            self.trainers[first + local_rank] = subprocess.Popen(
                [sys.executable, str(TRAINER), *self.flags],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}})

    def _send(self, number: int) -> None:
        for trainer in self.trainers.values():
            trainer.send_signal(number)

    def _kill(self) -> None:
        self.killed |= {rank for rank, trainer in self.trainers.items() if trainer.poll() is None}
        self._send(signal.SIGKILL)
        for trainer in self.trainers.values():
            trainer.wait()

    def _watch(self, plan: Plan) -> None:
        """The trainers run: have they ended, and does a step end from time to time? They have some seconds to end, and
        to finish a save, when the plan is not that they go on, or one has left the others alone."""
        codes, now = {rank: trainer.poll() for rank, trainer in self.trainers.items()}, time.monotonic()
        may_go_on = plan.start == self.report.start and (plan.goes or plan.saving)
        if not may_go_on or any(code not in (None, 0, 128 + self.signals.stop) for code in codes.values()):
            self.end, self.last_end = min(self.end, now + GRACE), min(self.last_end, now + SAVING)
        if any(code is not None and (code < 0 or code == 1) for code in codes.values()):
            Path(self.folder, f"said{self.report.start}.died").touch()  # others need not say that they have lost it
        if None not in codes.values():
            code, why = self._outcome({rank: code for rank, code in codes.items() if code and rank not in self.killed})
            self.report = replace(self.report, code=code, why=why)
            self.since, self.notice = time.monotonic(), NOTICE
        elif now >= self.end:
            self.end = now + 1.0  # as a save is of several files
            if now >= self.last_end or not self._is_saving():
                self._kill()
        seconds = time.time() - self.begun.stat().st_mtime if self.begun.exists() else 0.0
        if self.report.code is None and seconds >= self.notice:
            self.notice = 2 * seconds
            say(f"warning: no step has ended for {seconds / 60:.0f} minutes; if a process hangs, Ctrl-C twice ends the "
                "run, and latest goes on from its newest checkpoint")

    def _is_saving(self) -> bool:
        """Whether rank 0 is here, and in the middle of a save."""
        is_alive = 0 in self.trainers and self.trainers[0].poll() is None
        return is_alive and any(self.hosts.leader.latest.parent.glob("*" + TEMPORARY_SUFFIX))

    def _outcome(self, ended: Mapping[int, int]) -> tuple[int, str]:
        """How the trainers ended, as one exit code and a reason: what one decided comes first, then a death. ended: the
        exit codes of those that did not end well, but for those that were killed from here."""
        for code in ended.values():
            if code > 1 and code not in (LostError.exit_code, 128 + AGAIN):
                return code, ""
        if not self.killed and not ended:
            return 0, ""
        if self.signals.stop:
            return 128 + self.signals.stop, ""
        died = [f"process {rank} " + (f"was killed ({NAMES.get(-code, -code)})" if code < 0 else "failed")
                + ", often because memory ran out" * (code == -signal.SIGKILL)
                for rank, code in ended.items() if code < 0 or code == 1]
        return DiedError.exit_code if died else LostError.exit_code, ", ".join(died)

    def _wait(self, what: str) -> None:
        """Nothing runs here: say what it waits for, but do not wait for ever."""
        waited = time.monotonic() - self.since
        if waited >= PATIENCE:
            raise DiedError(f"waited {PATIENCE:.0f} s for {what}")
        if waited >= self.notice:
            self.notice = 2 * waited
            say(printable_line(f"{name_of(self.hosts.key)}: waiting for {what}, {PATIENCE - waited:.0f} s more"))

    def _exit_code(self, code: int, news: str) -> int:
        """That of the run. Raises the error that ended it, unless a trainer of this host has shown it."""
        if code in (0, self.report.code) and code != DiedError.exit_code:
            return code
        error = UserError(news)
        error.exit_code = code
        raise error


if __name__ == "__main__":
    run(main, os._exit)  # the thread that talks to torch's store would not survive the interpreter's own end
