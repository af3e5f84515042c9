"""What the first host decides, case by case, and what the launcher understands. Real hosts: faults_hosts.py."""

import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from errors import UserError
from faults_hosts import two_hosts
from training import hosts, launch
from training.hosts import Hosts, Leader, Plan, Report

BOTH = {"hostC 1": 1, "hostD 2": 2}
KILLED = "process 1 was killed (SIGKILL)"


class Scene:
    """Hosts c and d, of one process and two, and their leader."""

    def __init__(self, folder: Path, least: int, most: int) -> None:
        self.latest = folder / "latest.pt"
        self.leader = Leader(least, most, self.latest, 3)
        self.reports = {"hostC 1": Report(1), "hostD 2": Report(2)}

    def plan(self, names: str, **changes: object) -> Plan:
        """What the leader plans when these hosts are here and run what it planned last; changes are by name: the code
        that the host's processes ended with."""
        here = {key: report for key, report in self.reports.items() if key[4].lower() in names}
        for key, report in here.items():
            plan, code = self.leader.plan, changes.get(key[4].lower(), 0)
            if plan.goes and key in plan.members:
                report.start, code = plan.start, changes.get(key[4].lower())
            report.code, report.why = code, KILLED * (code == 1)  # type: ignore[assignment]
        return self.leader.decide(here)

    def save(self) -> None:
        self.latest.touch()
        os.utime(self.latest, (self.latest.stat().st_mtime + 1,) * 2)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "LAST_CALL", 0.0)
    return lambda least, most: Scene(tmp_path, least, most)


@pytest.mark.parametrize("codes, code, news", [
    ({"c": 0, "d": 0}, 0, ""), ({"c": 2, "d": 2}, 2, "hostC has stopped the run"),
    ({"d": 130}, 130, "hostD has stopped"), ({"c": 5, "d": 4}, 4, "hostD has stopped"),
    ({"c": 5, "d": 1}, 1, f"hostD: {KILLED}; no new checkpoint was saved before that, so another start"),
])
def test_what_processes_decide_is_final(scene, codes, code, news):
    """So is a death before the first checkpoint."""
    two = scene(2, 2)
    assert two.plan("cd").members == BOTH
    assert not two.plan("cd").news
    plan = two.plan("cd", **codes)
    assert plan.code == code and plan.news.startswith(news)


def test_a_run_is_started_again_as_long_as_it_gets_further(scene):
    two = scene(2, 2)
    for start in range(1, 10):
        two.save()
        assert (two.plan("cd").start, two.leader.plan.goes) == (start, True)
        plan = two.plan("cd", c=5, d=1)
        assert not plan.goes and plan.news == (f"hostD: {KILLED}; the run goes on from its newest checkpoint (start "
                                               f"{start + 1})")
    for _ in (2, 3):
        two.plan("cd")
        assert two.plan("cd", c=1).code is None
    two.plan("cd")
    plan = two.plan("cd", c=1)
    assert plan.code == 1 and "no new checkpoint was saved before that" in plan.news


def test_hosts_join_leave_and_come_back(scene):
    """--nnodes=1:2: a host that joins makes the run save; one that is gone does not, and the run goes on without."""
    two = scene(1, 2)
    assert two.plan("c").members == {"hostC 1": 1}
    two.reports["hostD 2"].left = True  # as soon as it came
    assert two.plan("cd").goes
    two.reports["hostD 2"].left = False
    plan = two.plan("cd")
    assert (plan.goes, plan.saving) == (False, True) and plan.news.startswith("hostD joins: the run saves")
    plan = two.plan("cd", c=140)
    assert (plan.start, plan.goes, plan.members) == (2, True, BOTH)
    two.plan("cd")
    plan = two.plan("c")
    assert (plan.goes, plan.saving) == (False, False) and plan.news.startswith("hostD is gone; the run goes on")
    assert two.plan("c").members == {"hostC 1": 1}
    assert two.plan("cd").saving


def test_a_first_host_that_is_gone_ends_the_others(monkeypatch, tmp_path):
    """But not at once: it may come back."""
    monkeypatch.setattr(hosts, "Thread", Mock())
    here, now = Hosts(("node1", 29500), Leader(2, 2, tmp_path, 3), Report(1)), time.monotonic()
    here.plan = Plan(1, BOTH, goes=True)
    found = {silence: (setattr(here, "heard", now - silence), here.decide(Report(1)))[1] for silence in (0, 60, 100)}
    assert found[0].goes and (found[60].waiting, found[60].code) == ("node1:29500, where the hosts meet", None)
    assert found[100].code == 1 and found[100].news.startswith("hostC, the first host of the run, is gone")


def test_hosts_wait_for_each_other(scene):
    two = scene(2, 2)
    assert two.plan("c").waiting == "1 more of 2 hosts (here: hostC)"
    two.reports["hostD 2"].start = 4  # the launcher of the first host is another one; the second knows earlier starts
    assert (two.plan("cd").start, two.leader.plan.goes) == (5, True)
    one = scene(1, 1)
    assert one.plan("cd").members == {"hostC 1": 1}


@pytest.mark.parametrize("flags, machines", [
    ("", (1, 1, None, 3)), ("--nnodes=1 --rdzv_endpoint=node1", (1, 1, None, 3)),
    ("--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=node1:29400 --rdzv_id=a", (2, 2, ("node1", 29400), 3)),
    ("--nnodes 1:4 --rdzv-endpoint node1 --max_restarts=0", (1, 4, ("node1", 29500), 0)),
])
def test_the_launcher_reads_torchruns_flags(flags, machines):
    assert launch._machines(flags) == machines


@pytest.mark.parametrize("flags", ["--nnodes=0", "--nnodes=2", "--nnodes=3:2", "--nnodes=a", "--tee=3",
                                   "--rdzv_endpoint=a:b", "'"])
def test_wrong_flags_of_torchrun_are_one_line(flags):
    with pytest.raises(UserError, match="^TORCHRUN_FLAGS: "):
        launch._machines(flags)


@pytest.mark.parametrize("name", ["another --mini_batch_size", "Ctrl-C on the second",
                                  "a second Ctrl-C on the second"])
def test_two_hosts_in_short(name):
    assert two_hosts([name]).failures == []
