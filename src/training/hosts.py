"""Which hosts take part in a run, and what they do next.

Each host has a launcher (launch.py), which reports what its processes do. One of them, the first host, leads: it makes
a plan from all reports, and every launcher does what the plan says. On one machine that is a call and nothing else.
Several exchange reports and plan, a few times a second, through a store (torch's TCPStore) in the first launcher. Both
are JSON: nothing that comes from the network is ever unpickled.
"""

import json
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from errors import DiedError, LostError

LAST_CALL = 5.0  # seconds to wait for more hosts than are needed
GONE = 30.0  # seconds without a word after which a host is gone


@dataclass
class Report:
    """What a host says of itself."""

    host: str
    processes: int
    start: int = 0  # the number of the start of the run that it took part in last
    running: bool = False  # whether its processes still run
    code: int = 0  # how they ended
    why: str = ""  # what is told of that
    left: bool = False  # whether its launcher ends


@dataclass
class Plan:
    """What all hosts do."""

    start: int = 0
    members: dict[str, int] = field(default_factory=dict)  # the hosts, by their keys, and their numbers of processes
    goes: bool = False  # whether this start is to run; if not, its processes end,
    saving: bool = False  # after a save, where that is possible
    told: str = ""  # what happened, for the user
    waiting: str = ""  # what for
    code: int | None = None  # the exit code, when the run is over


class Leader:
    """Makes the plan."""

    def __init__(self, least: int, most: int, latest: Path, most_restarts: int) -> None:
        self.least, self.most, self.latest, self.most_restarts = least, most, latest, most_restarts
        self.plan = Plan()
        self.restarts, self.saved = 0, self._saved()  # in a row, without a new checkpoint between them
        self.names: dict[str, str] = {}  # of all hosts that ever were here, by their keys
        self.here, self.arrived = set[str](), 0.0  # which are, and since when just these

    def _saved(self) -> float:
        with suppress(OSError):
            return self.latest.stat().st_mtime
        return 0.0

    def decide(self, reports: Mapping[str, Report]) -> Plan:
        """The plan, from the reports of all hosts that are here, by key."""
        if self.plan.code is None:
            if self.here != reports.keys():
                self.here, self.arrived = set(reports), time.monotonic()
            self.names |= {key: report.host for key, report in reports.items()}
            if self.plan.goes:
                self._watch(reports)
            elif running := [report.host for report in reports.values() if report.running]:
                self.plan.waiting = f"the processes of {', '.join(running)} to end"
                self.plan.saving &= self.plan.members.keys() <= reports.keys()  # one that is gone takes part in no save
            else:
                self._begin({key: report for key, report in reports.items() if not report.left})
        return self.plan

    def _watch(self, reports: Mapping[str, Report]) -> None:
        """While a start goes: has it ended, does it go on, does another host join?"""
        plan = self.plan
        ended = [report for key, report in reports.items()
                 if key in plan.members and report.start == plan.start and not report.running]
        final = [report for report in ended if report.code not in (0, DiedError.exit_code, LostError.exit_code)]
        died = [f"{report.host}: {report.why}" for report in ended if report.code == DiedError.exit_code]
        gone = [self.names[key] for key in plan.members if key not in reports]
        if final:
            self.end(final[0].code, f"{final[0].host} has stopped the run")
        elif len(ended) == len(plan.members) and not any(report.code for report in ended):
            self.end(0)
        elif died or gone or any(report.code for report in ended):
            told = died or [f"{name} is gone" for name in gone] or ["the connection between the processes is lost"]
            self._again("; ".join(told), bool(died))
        elif len(plan.members) < self.most and (joined := [key for key in reports if key not in plan.members]):
            self.plan = replace(plan, goes=False, saving=True,
                                told=f"{self.names[joined[0]]} joins: the run saves and goes on with it "
                                     f"(start {plan.start + 1})")

    def _again(self, told: str, died: bool) -> None:
        """Start once more from the newest checkpoint, unless that would only repeat what happened."""
        saved = self._saved()
        self.restarts = self.restarts + 1 if saved == self.saved else 1
        self.saved = saved
        if died and not saved:
            self.end(DiedError.exit_code, f"{told}. A process of the run died before the first checkpoint was saved; "
                     "starting again by itself would only repeat that, so see above why, and run the command again")
        elif self.restarts > self.most_restarts:
            self.end(DiedError.exit_code, f"{told}. The run was started again {self.most_restarts} times without "
                     "getting to a new checkpoint; see above why")
        else:
            self.plan = replace(self.plan, goes=False, told=f"{told}; the run goes on from its newest checkpoint "
                                f"(start {self.plan.start + 1})")

    def _begin(self, reports: Mapping[str, Report]) -> None:
        if len(reports) >= self.most or (len(reports) >= self.least and time.monotonic() - self.arrived >= LAST_CALL):
            members = {key: report.processes for key, report in list(reports.items())[:self.most]}
            start = 1 + max([self.plan.start, *(report.start for report in reports.values())])
            self.plan = Plan(start, members, goes=True, told=self.plan.told)
        else:
            here = ", ".join(report.host for report in reports.values())
            self.plan.waiting = f"{max(1, self.least - len(reports))} more of {self.most} hosts (here: {here})"

    def end(self, code: int, told: str = "") -> None:
        """The run is over."""
        self.plan = replace(self.plan, goes=False, code=code, told=told)


class Hosts:
    """This host's connection to the store. A thread of its own talks to it, so that a dead link stops nothing. A single
    host has neither."""

    def __init__(self, endpoint: tuple[str, int] | None, leader: Leader, report: Report) -> None:
        self.endpoint, self.leader, self.report = endpoint, leader, report
        self.key = uuid.uuid4().hex
        self.plan, self.heard, self.alone = Plan(), 0.0, False
        self._store: Any = None  # the server, in the first launcher
        self._seen: dict[str, tuple[bytes, float]] = {}  # the hosts' reports, and since when they are the same
        if endpoint:
            Thread(target=self._talk, args=endpoint, daemon=True).start()

    def decide(self, report: Report) -> Plan | None:
        """The plan, or None while the first host is not to be reached."""
        self.report = report
        if not self.endpoint:
            return self.leader.decide({self.key: report})
        return self.plan if self.heard and time.monotonic() - self.heard < GONE else None

    def leave(self, code: int) -> None:
        """Tell the others; the first host, without which they cannot go on, stays until they have left, for a while."""
        self.report = replace(self.report, left=True)
        if self.leader.plan.code is None:
            self.leader.end(code, f"{self.report.host}, the first host, has left")
        end = time.monotonic() + (15 if self._store else 3)
        told = time.monotonic() + 0.5
        while self.endpoint and time.monotonic() < end and (self.heard < told or (self._store and not self.alone)):
            time.sleep(0.05)

    def _talk(self, host: str, port: int) -> None:
        while True:
            with suppress(OSError, RuntimeError, TypeError, ValueError):  # the store is not there, or not ours
                store = self._connect(host, port)
                store.set(f"host{store.add('hosts', 1)}", self.key)
                while True:
                    report = json.dumps({**asdict(self.report), "time": time.monotonic()})
                    store.set(self.key, report)
                    if self._store:
                        self._lead(store)
                    self.plan, self.heard = Plan(**json.loads(store.get("plan"))), time.monotonic()
                    time.sleep(0.2)
            time.sleep(0.5)

    def _connect(self, host: str, port: int) -> Any:
        from datetime import timedelta

        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if not self._store:
            with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError, RuntimeError):
                probe.bind((host, 0))  # works with an address of this machine only, which is then the first host
                self._store = TCPStore(host, port, is_master=True, wait_for_workers=False)
        socket.create_connection((host, port), timeout=5).close()  # fails without a word, where TCPStore warns
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))

    def _lead(self, store: Any) -> None:
        """Read all reports that changed a short while ago, this host's first, and write the plan."""
        now = time.monotonic()
        for number in range(1, store.add("hosts", 0) + 1):
            if store.check([f"host{number}"]) and store.check([key := store.get(f"host{number}").decode()]):
                report = store.get(key)
                if self._seen.get(key, (b"", 0.0))[0] != report:
                    self._seen[key] = (report, now)
        reports = {}
        for key in sorted(self._seen, key=lambda key: key != self.key):
            fields = json.loads(self._seen[key][0])
            del fields["time"]
            if now - self._seen[key][1] < GONE:
                reports[key] = Report(**fields)
        self.alone = all(report.left for report in reports.values())
        store.set("plan", json.dumps(asdict(self.leader.decide(reports))))
