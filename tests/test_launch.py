"""What the first host decides, case by case, what the launcher understands, and what the processes of a run say to each
other, also when one of them fails. Real hosts: faults_hosts.py."""

import json
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import DistBackendError

from errors import CheckpointError, LostError, UserError
from faults_hosts import two_hosts
from training import hosts, launch, processes
from training.hosts import Hosts, Leader, Plan, Report
from training.processes import Processes, digest, join

BOTH = {"hostC 1": 1, "hostD 2": 2}
KILLED = "process 1 was killed (SIGKILL)"
ONE_OF_TWO = Processes(0, 2, torch.device("cpu"))


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


@pytest.mark.parametrize("host, theirs, said", [
    ("hostD", {"--a": 1, "data": "x"}, ""),
    ("hostD", {"--a": 2, "data": "x"}, "--a is 1 on hostC, 2 on hostD"),
    ("hostD", {"--a": None, "data": "y"}, "--a is 1 on hostC, None on hostD; data is x on hostC, y on hostD"),
    ("hostD", {"data": "x"}, "--a is 1 on hostC, None on hostD"),
    ("hostC", {"--a": 2, "data": "x"}, "--a is 1 on hostC, 2 on hostC"),
])
def test_what_differs_is_named_with_the_places(monkeypatch, host, theirs, said):
    monkeypatch.setattr(processes, "HOST", "hostC")
    monkeypatch.setattr(Processes, "gather", lambda _, mine: [mine, [host, theirs]])
    try:
        ONE_OF_TWO.compare({"--a": 1, "data": "x"})
        assert not said
    except UserError as error:
        assert str(error) == f"the processes were started differently: {said}"


@pytest.mark.parametrize("left_over", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_an_environment_that_no_launcher_has_made_is_one_line(monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^the environment has RANK . and WORLD_SIZE ., .*; unset them, or start with "):
        processes.join("cpu")


@pytest.mark.parametrize("mine, other, said", [
    (None, ["hostD", 2, "no data"], "stopped by hostD: no data"), (None, ["hostC", 2, "no data"], "no data"),
    (CheckpointError("damaged"), ["hostD", None, ""], "hostC: damaged"),
    (CheckpointError("damaged"), ["hostC", None, ""], "damaged"), (None, ["hostD", None, ""], ""),
])
def test_an_error_of_one_process_is_one_of_all(monkeypatch, mine, other, said):
    monkeypatch.setattr(processes, "HOST", "hostC")
    monkeypatch.setattr(Processes, "gather", lambda _, own: [own, other])
    try:
        with ONE_OF_TWO.together():
            if mine:
                raise mine
        assert not said
    except UserError as error:
        assert (str(error), error.exit_code) == (said, 3 if mine else 2)


@pytest.mark.parametrize("error, becomes, said", [
    *((error, UserError, "out of memory on cpu: do this") for error in (
        torch.OutOfMemoryError("CUDA out of memory.\nMore."), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
        torch.AcceleratorError("CUDA error: out of memory\nMore."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"))),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore."), UserError,
     "has no kernels for cpu; install a build for an older CUDA"),
    (RuntimeError("[/gloo/transport/tcp/pair.cc:5] Connection closed by peer"), LostError, "rank 0 has lost another"),
    (DistBackendError("NCCL error. More\nncclRemoteError: x\nLast error:\nsocket closed\n"), LostError,
     r"rank 0 has lost another process of the run \(socket closed\)$"),
    (DistBackendError("NCCL error, unhandled system error. More"), LostError, "system error\\)$"),
    (DistBackendError("NCCL error\nLast error:\nError while creating shared memory segment /dev/shm/a"),
     UserError, "--shm-size 1g"),
    (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nMore."), UserError,
     "busy or unavailable: another program may hold it"),
    (torch.AcceleratorError("CUDA error: invalid device ordinal\nMore."), UserError, "cpu: invalid device ordinal: "),
    (RuntimeError("shapes do not fit"), RuntimeError, "shapes do not fit"), (OSError("a disk"), OSError, "a disk"),
])
def test_memory_and_lost_processes_are_explained_and_nothing_else(error, becomes, said):
    with pytest.raises(becomes, match=said) as caught, ONE_OF_TWO.failures_explained("do this"):
        raise error
    assert type(caught.value) is becomes


def test_what_the_launcher_saw_die_is_said_by_it_alone(run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCT_SAID", str(tmp_path / "said"))
    (tmp_path / "said.died").touch()
    found = [run_main(Mock(side_effect=error)) for error in (LostError("lost"), UserError("a full disk"))]
    assert [(each.code, each.stderr) for each in found] == [(5, ""), (2, "error: a full disk\n")]


@pytest.mark.parametrize("error, kind, said", [
    ("NCCL error, unhandled cuda error\nLast error:\nCuda failure 217 'peer'", UserError, "Cuda failure 217 .*P2P"),
    ("[/gloo/pair.cc:5] Connection closed by peer", LostError, "lost another"),
    ("NCCL error, unhandled system error\nncclSystemError: x\nLast error:\nrefused", LostError, r"lost .*\(refused\)$"),
    ("NCCL error, remote process exited\nncclRemoteError: x\nLast error:\nclosed", LostError, r"lost .*\(closed\)$")])
def test_what_keeps_gpus_from_meeting_is_no_lost_process(tmp_path, monkeypatch, error, kind, said):
    """Another start would only repeat it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "INSTRUCT_STORE": f"file://{tmp_path}/store"}.items():
        monkeypatch.setenv(name, value)
    other = dist.PrefixStore(f"file://{tmp_path}/store", dist.FileStore(f"{tmp_path}/store", 2))
    other.set("facts 1", json.dumps(["hostD", {"--device": "cpu"}]))
    monkeypatch.setattr(dist, "init_process_group", Mock(side_effect=DistBackendError(error)))
    with pytest.raises(kind, match=said) as caught:
        join("cpu")
    assert type(caught.value) is kind


def test_a_digest_sees_every_bit_name_and_step():
    state = {"a": torch.zeros(3), "b": [torch.tensor(1.0), 2]}
    others = [{"a": torch.tensor([0.0, 0.0, -0.0]), "b": state["b"]}, {"c": state["a"], "b": state["b"]},
              {"a": state["a"], "b": [torch.tensor(1.0), 3]}, {"a": state["a"]}]
    assert len({digest(each) for each in (state, *others)}) == 5
    assert digest(state) == digest({"a": torch.zeros(3), "b": [torch.tensor(1.0), 2]})
