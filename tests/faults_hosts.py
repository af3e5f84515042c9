"""Two hosts on one machine: network namespaces that a cable (a veth pair) connects, each with a name of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults_tools import STEPS, Lab, Result, Trainer, measurement, newest
from helpers import write_random
from models import small_model, write_pretrained

HOSTS = ("hostC", "hostD")
# sets the name of the host, then becomes the command
NAMED = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """The two hosts. Host 0 is 10.77.0.1, where they meet; the names hold this process's number, so that two tests can
    run at once."""

    spaces = [f"{host}-{os.getpid()}" for host in HOSTS]
    ends = [f"v{number}-{os.getpid()}" for number in (0, 1)]

    def pull(self, number: int, state: str = "down") -> None:
        ip("-n", self.spaces[number], "link", "set", self.ends[number], state)


@contextmanager
def cable() -> Iterator[Cable]:
    made = Cable()
    try:
        ip("link", "add", made.ends[0], "type", "veth", "peer", "name", made.ends[1])
        for number, (space, end) in enumerate(zip(made.spaces, made.ends)):
            ip("netns", "add", space)
            ip("link", "set", end, "netns", space)
            ip("-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            made.pull(number, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield made
    finally:
        for space in made.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


class Launched(Trainer):
    """The launcher on one of two hosts."""

    def __init__(self, net: Cable, number: int, lab: Lab, folder: Path, flags: list[str], processes: int = 1,
                 nnodes: str = "2", fault: dict[str, Any] | None = None) -> None:
        super().__init__(lab, folder, processes, flags, {**(fault or {}), "launcher": 1}, [
            "ip", "netns", "exec", net.spaces[number], "unshare", "--uts", sys.executable, "-c", NAMED, HOSTS[number]],
            TORCHRUN_FLAGS=f"--nnodes={nnodes} --rdzv_endpoint=10.77.0.1:29500", GLOO_SOCKET_IFNAME=net.ends[number])
        self.processes = 2 * processes  # of the run

    def kill(self) -> None:
        """The host is gone: its launcher and all that it started."""
        for pid in (self.process.pid, *self.ranks()):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Pair:
    """The launchers of both hosts for one run."""

    def __init__(self, net: Cable, here: Lab, *flags: object, more: tuple[object, ...] = (), folder: Path | None = None,
                 hosts: tuple[int, ...] = (0, 1), processes: int = 1, nnodes: str = "2", **fault: Any) -> None:
        self.net, self.here, self.folder = net, here, folder or here.new_folder()
        self.flags, self.more = here.flags("--checkpoint_freq", 2, *flags), [str(flag) for flag in more]
        self.how: dict[str, Any] = {"processes": processes, "nnodes": nnodes, "fault": fault}
        self.both = [self.start(number) for number in hosts]
        if fault:  # of the sixth step
            self.both[0].shows("step 5/")

    def start(self, number: int) -> Launched:
        return Launched(self.net, number, self.here, self.folder, self.flags + self.more * number, **self.how)

    def exits(self, code: int) -> list[str]:
        return [each.exits(code) for each in self.both]

    def differs(self) -> str:
        return self.both[0].differs()

    def orphans(self) -> str:
        return self.both[0].orphans()


def same_bits(net: Cable, here: Lab, processes: int) -> list[str]:
    """Two hosts end in the bits of one host with as many processes."""
    pair = Pair(net, here, processes=processes)
    return [*pair.exits(0), pair.differs()]


def started_differently(net: Cable, here: Lab, flag: str, value: object, said: str = "") -> list[str]:
    """One line on each host names what differs and where. A value may be made in a folder."""
    pair = Pair(net, here, more=(flag, value(here.folder / f"other{flag}") if callable(value) else value))
    wrong, words = pair.exits(2), (f"started differently: {said or flag} is ", " on hostC, ", " on hostD")
    lines = [[line for line in each.output().splitlines() if "error" in line] for each in pair.both]
    return [*wrong, *(f"said {each}" for each in lines if len(each) != 1 or not all(word in each[0] for word in words))]


def one_is_wrong(net: Cable, here: Lab, flag: str, value: str, reason: str) -> list[str]:
    """An error of one host is said there with its name; the other says which host stopped it."""
    pair = Pair(net, here, more=(flag, here.folder / value))
    wrong = pair.exits(2)
    for each, begin in zip(pair.both, ("error: stopped by hostD: ", "error: hostD: ")):
        lines = [line for line in each.output().splitlines() if "error" in line]
        wrong.append(f"said {lines}" * (len(lines) != 1 or not lines[0].startswith(begin) or reason not in lines[0]))
    return wrong


def waiting_is_told(net: Cable, here: Lab, number: int, what: str) -> list[str]:
    """A host alone says what it waits for; Ctrl-C leaves."""
    alone = Launched(net, number, here, here.new_folder(), here.flags())
    said, seconds = alone.shows(f"waiting for {what}"), time.monotonic() - alone.begin
    alone.process.send_signal(signal.SIGINT)
    return ["said nothing" * (not said), f"after {seconds:.0f} s" * (seconds > 10), alone.exits(130)]


def ctrl_c(net: Cable, here: Lab, number: int) -> list[str]:
    """Ctrl-C on one host ends both, saved; the same command with --resume auto goes on."""
    pair = Pair(net, here, "--resume", "auto", "--checkpoint_freq", 100, phase="step", at=6, seconds=2)
    pair.both[number].process.send_signal(signal.SIGINT)
    wrong = [*pair.exits(130), "not saved" * (newest(pair.folder) < 5), pair.orphans()]
    again = Pair(net, here, "--resume", "auto", "--checkpoint_freq", 100, folder=pair.folder)
    return [*wrong, *again.exits(0), again.differs(), "not resumed" * ("resumed from" not in again.both[0].output())]


def second_ctrl_c(net: Cable, here: Lab, number: int) -> list[str]:
    """A second Ctrl-C on one host, in a step that takes a minute."""
    pair = Pair(net, here, phase="step", at=6, seconds=60)
    for _ in range(2):
        time.sleep(1.2)
        pair.both[number].process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    wrong = pair.exits(130)
    return [*wrong, pair.orphans(), f"it took {time.monotonic() - begin:.0f} s" * (time.monotonic() - begin > 15)]


def a_process_is_killed(net: Cable, here: Lab) -> list[str]:
    """kill -9 of a trainer of the second host: both say so, and the run goes on to the same bits."""
    pair = Pair(net, here, phase="step", at=6, seconds=2)
    os.kill(pair.both[1].ranks()[0], signal.SIGKILL)
    said = "hostD: process 1 was killed (SIGKILL), often because memory ran out"
    return [*pair.exits(0), pair.differs(), *("not said" * (said not in each.output()) for each in pair.both)]


def a_host_joins(net: Cable, here: Lab) -> list[str]:
    """--nnodes=1:2: one host begins, another joins, and the run goes on with both."""
    pair = Pair(net, here, nnodes="1:2", hosts=(0,), phase="step", at=6, seconds=15)
    pair.both.append(pair.start(1))
    wrong, said = pair.exits(0), pair.both[0].output()
    return [*wrong, "not said" * ("hostD joins" not in said), "not resumed" * ("resumed from" not in said),
            "not both" * ("cpu, 2 processes" not in said), "no end" * (newest(pair.folder) != STEPS)]


def a_host_comes_back(net: Cable, here: Lab, number: int) -> list[str]:
    """--nnodes=1:2: a host dies, all its processes at once, and comes back with the same command."""
    pair = Pair(net, here, nnodes="1:2", phase="step", at=6, seconds=15)
    pair.both[number].kill()
    time.sleep(2)
    pair.both[number] = pair.start(number)
    wrong = pair.exits(0)
    return [*wrong, "not resumed" * ("resumed from" not in pair.both[0].output()), pair.orphans(),
            "no end" * (newest(pair.folder) != STEPS)]


def the_first_host_is_gone(net: Cable, here: Lab) -> list[str]:
    """It does not come back: the other ends with one line that names it, within two minutes."""
    pair = Pair(net, here, phase="step", at=6, seconds=2)
    pair.both[0].kill()
    begin = time.monotonic()
    wrong, seconds = pair.both[1].exits(1), time.monotonic() - begin
    last = pair.both[1].output().splitlines()[-1]
    return [wrong, f"it took {seconds:.0f} s" * (seconds > 120), pair.orphans(),
            f"said {last}" * (not last.startswith("error: hostC, the first host of the run, is gone"))]


def a_dead_link(net: Cable, here: Lab) -> list[str]:
    """The cable is pulled in a step: both say who is gone; once it is back the run goes on to the same bits."""
    pair = Pair(net, here, phase="step", at=6, seconds=2)
    net.pull(1)
    begin, wrong = time.monotonic(), []
    for each, said in zip(pair.both, ("hostD is gone", "waiting for 10.77.0.1:29500, where the hosts meet")):
        wrong.append(f"{said}: not said" * (not each.shows(said, 120)))
    wrong.append(f"it took {time.monotonic() - begin:.0f} s" * (time.monotonic() - begin > 60))
    net.pull(1, "up")
    return [*wrong, *pair.exits(0), pair.differs(), pair.orphans()]


CASES: dict[str, Callable[[Cable, Lab], list[str]]] = {
    "2 x 1 processes": partial(same_bits, processes=1),
    "2 x 2 processes": partial(same_bits, processes=2),
    **{f"another {flag}": partial(started_differently, flag=flag, value=value) for flag, value in (
        ("--learning_rate", 5e-4), ("--seed", 2), ("--weight_decay", 0.5), ("--total_batch_size", 512),
        ("--mini_batch_size", 4), ("--max_steps", 30))},
    "other data": partial(started_differently, flag="--data_dir", said="the data",
                          value=lambda folder: write_random(folder, 61, 15, 64)),
    "other weights": partial(started_differently, flag="--pretrained_model", said="the weights",
                             value=lambda folder: write_pretrained(folder, small_model(seed=9))),
    "a folder that is not shared": partial(one_is_wrong, flag="--checkpoint_dir", value="own", reason="have to share"),
    "no data on one host": partial(one_is_wrong, flag="--data_dir", value="absent", reason="no prepared data"),
    "the first host alone": partial(waiting_is_told, number=0, what="1 more of 2 hosts (here: hostC)"),
    "the second host alone": partial(waiting_is_told, number=1, what="10.77.0.1:29500, where the hosts meet"),
    "Ctrl-C on the first": partial(ctrl_c, number=0),
    "Ctrl-C on the second": partial(ctrl_c, number=1),
    "a second Ctrl-C on the first": partial(second_ctrl_c, number=0),
    "a second Ctrl-C on the second": partial(second_ctrl_c, number=1),
    "a process is killed": a_process_is_killed,
    "a host joins": a_host_joins,
    "the second host dies": partial(a_host_comes_back, number=1),
    "the first host dies": partial(a_host_comes_back, number=0),
    "a dead link": a_dead_link,
    "the first host is gone": the_first_host_is_gone,
}


@measurement("two hosts, network namespaces with a cable between them")
def two_hosts(result: Result, here: Lab, names: Sequence[str] = tuple(CASES)) -> None:
    try:
        with cable():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs network namespaces, so root and iproute2: {getattr(error, 'stderr', b'') or error!r}")
    for name in names:
        begin = time.monotonic()
        with cable() as net:
            result.check(name, *CASES[name](net, here))
        print(f"    {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


@measurement("what listens on one host")
def ports(result: Result, here: Lab) -> None:
    """The listening sockets of the launcher and its trainers: none for one process, on loopback alone for several."""
    for count in (1, 2):
        run = here.start(count, "--checkpoint_freq", 100, phase="step", at=5, seconds=3, launcher=1)
        run.wait_for(Trainer.stopped)
        found = [address for pid in (run.process.pid, *run.ranks()) for address in listening(pid)]
        outside = [address for address in found if address != LOOPBACK]
        result.check(f"{count} processes", f"listens at {outside}" * bool(outside), run.exits(0),
                     f"{len(found)} sockets" * (bool(found) != (count > 1)), run.differs())


LOOPBACK = "0100007F"  # 127.0.0.1 in /proc/net/tcp


def listening(pid: int) -> list[str]:
    """The addresses at which a process listens (TCP) or is bound (UDP), as /proc/net writes them."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = []
    for kind, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].partition(":")[0])
    return found
