"""Start the training processes of this host, and leave with the run's exit code:

    python -m training.launch NPROC [trainer flags...]

When a process dies, all are started again and go on from the newest checkpoint. What a trainer itself decided, an error
of the user's for instance, is final. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the trainers, which take the
time they need to save; a second one ends them. On several machines run this on each, with torchrun's flags in
TORCHRUN_FLAGS; see hosts.py. On one machine nothing listens beyond loopback, and a single process needs no connection.
"""

import errno
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from cli import Parser, printable_line, run, unread_output
from errors import DiedError, LostError, UserError, errors_at
from training.ending import AGAIN, WATCHED_SIGNALS, block_signals
from training.hosts import Hosts, Leader, Plan, Report
from training.options import parse_options
from weights.durable import lock_folder

GRACE = 5.0  # seconds to end in, for processes that another one has left alone
NOTICE = 8.0  # seconds between lines that say what is being waited for
PATIENCE = 600.0  # seconds to wait for other hosts
TRAINER = Path(__file__).parent.parent / "train_instruct.py"


def main() -> int:
    block_signals()
    most_processes = max(8, os.cpu_count() or 1)
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or not 1 <= int(sys.argv[1]) <= most_processes:
        raise UserError(f"the first argument is the number of processes, 1 to {most_processes} on this machine")
    processes, flags = int(sys.argv[1]), sys.argv[2:]
    options = parse_options(flags)
    checkpoint_dir = Path(options.checkpoint_dir)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    least, most, endpoint, restarts = _machines(os.environ.get("TORCHRUN_FLAGS", ""))
    leader, report = Leader(least, most, checkpoint_dir / "latest.pt", restarts), Report(platform.node(), processes)
    if most == 1 and not options.dry_run:  # on several machines, another launcher's trainer may hold it for this run
        with lock_folder(checkpoint_dir):
            pass  # refused before any process is started if a run goes on there
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of addresses that have no name
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(endpoint if most > 1 else None, leader, report)
        return Launcher(report, flags, folder, hosts).run()


def _machines(text: str) -> tuple[int, int, tuple[str, int], int]:
    """From torchrun's flags: the least and the most machines, where they meet, and how often a run is started again."""
    parser = Parser()
    for name, default in {"nnodes": "1", "rdzv_endpoint": "", "rdzv_conf": "", "rdzv_backend": "", "rdzv_id": "",
                          "node_rank": "", "local_addr": "", "max_restarts": "3", "master_addr": "127.0.0.1",
                          "master_port": "29500"}.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=default)
    parser.add_argument("--standalone", action="store_true")
    with errors_at("TORCHRUN_FLAGS", ValueError):
        flags = parser.parse_args(shlex.split(text))
        least, _, most = flags.nnodes.partition(":")
        host, _, port = (flags.rdzv_endpoint or f"{flags.master_addr}:{flags.master_port}").partition(":")
        if not 1 <= int(least) <= int(most or least):
            raise ValueError("--nnodes takes a number of machines such as 2, or the least and the most such as 1:4")
        return int(least), int(most or least), (host, int(port or 29500)), int(flags.max_restarts)


class Launcher:
    """The processes of this host, through all starts of the run."""

    def __init__(self, report: Report, flags: list[str], folder: str, hosts: Hosts) -> None:
        self.report, self.flags, self.folder, self.hosts = report, flags, folder, hosts
        self.endpoint = "{}:{}".format(*hosts.endpoint) if hosts.endpoint else ""
        self.trainers: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self.killed: set[int] = set()  # the ranks that were ended from here
        self.ending = 0.0  # since when the trainers are to end: one has ended badly, or the plan says so
        self.stop, self.stopped = 0, 0.0  # the signal that asked to stop, and when it came
        self.waiting, self.notice = 0.0, 0.0  # since when this host has waited for others, and when to say so
        self.told, self.asked = "", 0  # what was said of the plan, and the start that was asked to save and end

    def run(self) -> int:
        """Do what the plan says until the run is over. Returns or raises its exit code."""
        code = DiedError.exit_code
        try:
            while True:
                if received := signal.sigtimedwait(WATCHED_SIGNALS, 0.1):
                    self._pass_on(received.si_signo)
                self._look()
                plan = self.hosts.decide(replace(self.report))
                if plan and plan.code is None and plan.told not in ("", self.told):
                    _say(f"warning: {plan.told}")
                    self.told = plan.told
                if self.report.running:
                    self._end_unless(plan)
                elif plan and plan.code is not None:
                    code = plan.code
                    return self._code_of(plan)
                elif self.stop:
                    code = 128 + self.stop
                    return code
                elif plan and plan.goes and self.hosts.key in plan.members and plan.start > self.report.start:
                    self._start(plan)
                else:
                    self._wait(plan)
        finally:
            self._kill()
            self.hosts.leave(code)

    def _pass_on(self, number: int) -> None:
        """A signal from outside goes to the trainers; a second one to stop ends them."""
        if number == AGAIN:
            return
        if number != signal.SIGUSR1 and self.stop and time.monotonic() - self.stopped >= 1.0:
            self._kill()
        elif number != signal.SIGUSR1 and not self.stop:
            self.stop, self.stopped = number, time.monotonic()
        self._send(number)

    def _send(self, number: int) -> None:
        for trainer in self.trainers.values():
            if trainer.poll() is None:
                trainer.send_signal(number)

    def _kill(self) -> None:
        self.killed |= {rank for rank, trainer in self.trainers.items() if trainer.poll() is None}
        self._send(signal.SIGKILL)
        for trainer in self.trainers.values():
            trainer.wait()

    def _look(self) -> None:
        """See how the trainers are; one that ended badly leaves the others some seconds to end by themselves."""
        if not self.report.running:
            return
        if self.ending and time.monotonic() - self.ending >= GRACE:
            self._kill()
        codes = [trainer.poll() for trainer in self.trainers.values()]
        if any(code not in (None, 0, 128 + self.stop) for code in codes):
            self.ending = self.ending or time.monotonic()
        if None not in codes:
            self.report.code, self.report.why = self._outcome()
            self.report.running = False

    def _outcome(self) -> tuple[int, str]:
        """How the processes of this host ended, as one code: what a trainer decided comes first, then a death."""
        codes = {rank: trainer.returncode for rank, trainer in self.trainers.items() if rank not in self.killed}
        for code in codes.values():
            if code > 1 and code not in (LostError.exit_code, 128 + AGAIN):
                return code, ""
        if self.stop and (self.killed or any(codes.values())):
            return 128 + self.stop, ""
        names = {int(each): each.name for each in signal.Signals}
        died = [f"process {rank} " + (f"was killed ({names.get(-code, -code)})" if code < 0 else "failed")
                + ", often because memory ran out" * (code == -signal.SIGKILL)
                for rank, code in codes.items() if code < 0 or code == 1]
        if died:
            return DiedError.exit_code, ", ".join(died)
        return LostError.exit_code if self.killed or any(codes.values()) else 0, ""

    def _end_unless(self, plan: Plan | None) -> None:
        """Have the trainers end unless the plan is that they go on."""
        if self.ending or (plan and plan.goes and plan.start == self.report.start):
            return
        if not plan or plan.start != self.report.start or not plan.saving:
            self.ending = time.monotonic()
        elif self.asked != plan.start:
            self.asked = plan.start
            self._send(AGAIN)

    def _code_of(self, plan: Plan) -> int:
        """The run's exit code. Raises the error that ended it, unless a trainer of this host has shown it already."""
        code = plan.code or 0
        if not plan.told or (code == self.report.code != DiedError.exit_code):
            return code
        error = UserError(plan.told)
        error.exit_code = code
        raise error

    def _start(self, plan: Plan) -> None:
        keys = list(takewhile(lambda key: key != self.hosts.key, plan.members))
        first, world_size = sum(plan.members[key] for key in keys), sum(plan.members.values())
        # a start of this command that got to its first step has obeyed --resume; so has one that another host knows of
        begun, is_known = f"{self.folder}/begun", plan.start > 1 and not self.report.start
        is_restart = is_known or os.path.exists(begun)
        store = f"tcp://{self.endpoint}/{plan.start}" if self.endpoint else f"file://{self.folder}/store{plan.start}"
        shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": self.report.processes, "INSTRUCT_STORE": store,
                  "INSTRUCT_SAID": f"{self.folder}/said{plan.start}", "INSTRUCT_BEGUN": begun,
                  "INSTRUCT_IS_RESTART": int(is_restart)}
        if not self.endpoint:
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        self.trainers, self.killed, self.ending, self.waiting = {}, set(), 0.0, 0.0
        self.report.start, self.report.running = plan.start, True
        for local_rank in range(self.report.processes):
            environment = {**shared, "RANK": first + local_rank, "LOCAL_RANK": local_rank}
            self.trainers[first + local_rank] = subprocess.Popen(
                [sys.executable, str(TRAINER), *self.flags],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}})

    def _wait(self, plan: Plan | None) -> None:
        """Nothing runs here: say what it waits for, but do not wait for ever."""
        now = time.monotonic()
        if not self.waiting:
            self.waiting, self.notice = now, now + NOTICE
        what, left = f"{self.endpoint}, where the hosts meet", PATIENCE + self.waiting - now
        if plan:
            what = plan.waiting or "a place among the hosts of the run"
        if left <= 0:
            raise DiedError(f"waited {PATIENCE:.0f} s for {what}")
        if now >= self.notice:
            _say(f"{self.report.host}: waiting for {what}, {left:.0f} s more")
            self.notice = now + min(60.0, now - self.waiting)


def _say(text: str) -> None:
    with unread_output(errno.ENOSPC, errno.EDQUOT):
        print(printable_line(text), flush=True)


def _leave(code: int) -> NoReturn:
    """Without the interpreter's own end, which the thread that talks to torch's store would not survive."""
    os._exit(code)


if __name__ == "__main__":
    run(main, _leave)
