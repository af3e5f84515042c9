"""Which hosts take part in a run, and what they do next.

The launcher of each host (launch.py) says in a Report what its processes do. The leader, in the launcher of the first
host, turns all reports into one Plan, and every launcher does what the plan says. On one machine that is a call and
nothing else. Several exchange them a few times a second through a store (torch's TCPStore) in the first launcher: a
queue of reports, and the plan. Both are JSON: nothing that comes from the network is ever unpickled.
"""

import json
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

from errors import DiedError, LostError

LAST_CALL = 5.0  # seconds to wait for more hosts than are needed
GONE, FIRST_GONE = 30.0, 100.0  # seconds without a word after which a host is gone; the first, which may come back


@dataclass
class Report:
    """What a host says of itself."""

    processes: int
    start: int = 0  # the number of the start of the run that it took part in last
    code: int | None = 0  # how its processes ended; None while they run
    why: str = ""  # which of them died, and how
    left: bool = False  # this is its last word


@dataclass
class Plan:
    """What all hosts do."""

    start: int = 0
    members: dict[str, int] = field(default_factory=dict)  # the hosts, by their keys, and their numbers of processes
    goes: bool = False  # whether this start is to run; if not, its processes end,
    saving: bool = False  # after a save, where that is possible
    news: str = ""  # what happened, for the user
    waiting: str = ""  # what for
    code: int | None = None  # the exit code, when the run is over


def name_of(key: str) -> str:
    """A host's name, from its key: hostC from "hostC 1f0e..."."""
    return key.partition(" ")[0]


class Leader:
    """Makes the plan."""

    def __init__(self, least: int, most: int, latest: Path, most_restarts: int) -> None:
        self.least, self.most, self.latest, self.most_restarts = least, most, latest, most_restarts
        self.plan = Plan()
        self.restarts, self.saved = 0, self._saved()  # in a row, without a new checkpoint between them
        self.here, self.arrived = set[str](), 0.0  # the hosts, and since when just these are here

    def _saved(self) -> float:
        with suppress(OSError):
            return self.latest.stat().st_mtime
        return 0.0

    def decide(self, reports: Mapping[str, Report]) -> Plan:
        """The plan, from the reports of all hosts that are here, by key; the first host comes first."""
        if self.here != reports.keys():
            self.here, self.arrived = set(reports), time.monotonic()
        if self.plan.goes:
            self._watch(reports)
        elif self.plan.code is None:
            if running := [name_of(key) for key in reports if reports[key].code is None]:
                self.plan.waiting = f"the processes of {', '.join(running)} to end"
                self.plan.saving &= self.plan.members.keys() <= reports.keys()  # one that is gone takes part in no save
            else:
                self._begin({key: report for key, report in reports.items() if not report.left})
        return self.plan

    def _begin(self, reports: Mapping[str, Report]) -> None:
        """Start the run when enough hosts are here."""
        if len(reports) >= self.most or (len(reports) >= self.least and time.monotonic() - self.arrived >= LAST_CALL):
            members = {key: report.processes for key, report in list(reports.items())[:self.most]}
            start = 1 + max(self.plan.start, *(report.start for report in reports.values()))
            self.plan = Plan(start, members, goes=True, news=self.plan.news)
        else:
            here = ", ".join(map(name_of, reports))
            self.plan.waiting = f"{max(1, self.least - len(reports))} more of {self.most} hosts (here: {here})"

    def _watch(self, reports: Mapping[str, Report]) -> None:
        """While a start goes: has it ended, does it go on, does another host join?"""
        plan = self.plan
        codes = {key: report.code for key, report in reports.items()
                 if key in plan.members and report.start == plan.start and report.code is not None}
        final = [key for key, code in codes.items() if code not in (0, DiedError.exit_code, LostError.exit_code)]
        died = [f"{name_of(key)}: {reports[key].why}" for key in codes if reports[key].why]
        gone = [f"{name_of(key)} is gone" for key in plan.members if key not in reports]
        joined = [name_of(key) for key, report in reports.items() if key not in plan.members and not report.left]
        if final:
            self.end(f"{name_of(final[0])} has stopped the run", codes[final[0]])
        elif gone or any(codes.values()):
            self._again("; ".join(died or gone or ["the connection between the processes is lost"]), bool(died))
        elif len(codes) == len(plan.members):
            self.end("", 0)
        elif joined and len(plan.members) < self.most:
            self.end(f"{joined[0]} joins: the run saves and goes on with it (start {plan.start + 1})", saving=True)

    def _again(self, news: str, died: bool) -> None:
        """Start once more from the newest checkpoint, unless that would only repeat what happened."""
        saved = self._saved()
        self.restarts, self.saved = self.restarts + 1 if saved == self.saved else 1, saved
        if self.restarts > (self.most_restarts if saved or not died else 0):
            self.end(f"{news}; no new checkpoint was saved before that, so another start would only repeat it: see "
                     "above why, and run the command again", DiedError.exit_code)
        else:
            self.end(f"{news}; the run goes on from its newest checkpoint (start {self.plan.start + 1})")

    def end(self, news: str, code: int | None = None, *, saving: bool = False) -> None:
        """This start is to end: with an exit code the run is over, without one another start follows."""
        self.plan = replace(self.plan, goes=False, saving=saving, news=news, code=code)


class Hosts:
    """This host among those of the run. A thread of its own talks to the store, so that a dead link stops nothing. A
    single host has neither."""

    def __init__(self, endpoint: tuple[str, int] | None, leader: Leader, report: Report) -> None:
        self.endpoint, self.leader, self.report = endpoint, leader, report
        self.key = f"{platform.node()} {uuid.uuid4().hex}"
        self.plan, self.heard = Plan(), 0.0  # the plan, and when it was heard last
        self._store: Any = None  # the server, in the first launcher
        self._last = {self.key: (report, 0.0)}  # each host's last report, and when it came; the first host's is first
        self._thread = Thread(target=self._talk, args=endpoint or (), daemon=True)
        if endpoint:
            self._thread.start()

    def decide(self, report: Report) -> Plan:
        """What this host does next; the report is its own."""
        self.report = report
        if not self.endpoint:
            return self.leader.decide({self.key: report})
        silence = time.monotonic() - self.heard
        if self.heard and silence < GONE:
            return self.plan
        if self.heard and silence >= FIRST_GONE:
            first = name_of(next(iter(self.plan.members), self.endpoint[0]))
            return Plan(code=DiedError.exit_code, news=f"{first}, the first host of the run, is gone and has not come "
                        "back; run the command again, there first")
        return Plan(waiting="{}:{}, where the hosts meet".format(*self.endpoint))

    def leave(self, code: int) -> None:
        """Let the others know; the first host, without which they cannot go on, stays a while until they have left."""
        if self.leader.plan.code is None:
            self.leader.end(f"{name_of(self.key)}, the first host, has left", code)
        self.report = replace(self.report, left=True)
        if self.endpoint:
            self._thread.join(15 if self._store else 3)

    def _talk(self, host: str, port: int) -> None:
        while True:
            with suppress(OSError, RuntimeError, TypeError, ValueError):  # the store is not there, or not ours
                store = self._connect(host, port)
                while True:
                    report = self.report
                    store.queue_push("reports", json.dumps([self.key, asdict(report)]))
                    if self._store:
                        self._lead(store)
                    self.plan, self.heard = Plan(**json.loads(store.get("plan"))), time.monotonic()
                    if report.left and not (self._store and self.leader.here - {self.key}):
                        return
                    time.sleep(0.2)
            time.sleep(0.5)

    def _connect(self, host: str, port: int) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if not self._store:
            with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError, RuntimeError):
                probe.bind((host, 0))  # works with an address of this machine only, which is then the first host
                self._store = TCPStore(host, port, is_master=True, wait_for_workers=False)
        socket.create_connection((host, port), timeout=5).close()  # fails without a word, where TCPStore warns
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))

    def _lead(self, store: Any) -> None:
        """Read all reports, and write the plan from those of the hosts that are here."""
        now = time.monotonic()
        for _ in range(store.queue_len("reports")):
            key, report = json.loads(store.queue_pop("reports"))
            self._last[key] = (Report(**report), now)
        plan = self.leader.decide({key: report for key, (report, came) in self._last.items() if now - came < GONE})
        self._last = {key: last for key, last in self._last.items() if not last[0].left}
        store.set("plan", json.dumps(asdict(plan)))
