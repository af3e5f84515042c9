"""Kills, signals, a full disk, a NaN on one rank: a short form of each measurement, and the long (slow), which
faults.py runs.

What was not as it should be is said at once, then how many cases were. The short forms run two at a time: most of their
time goes into starting Python.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from errors import UserError
from faults_disk import disk_full, soak
from faults_hosts import ports, two_hosts
from faults_kill import MEMORY, dies_before_it_began, hangs, kills, memory, rank_dies, rank_dies_early, write_order
from faults_signals import DIVERGENCES, hangup, one_rank_diverges, second_ctrl_c, signals
from faults_tools import Lab, Result
from training import launch
from weights.durable import lock_folder

FULL = {
    "kill": partial(kills, 200, in_saves=100),
    "order": write_order,
    "disk": partial(disk_full, 20),
    "signals_1": partial(signals, ("the process",)),
    "signals_2": partial(signals, ("one rank", "all ranks", "the launcher")),
    "second": second_ctrl_c,
    "rank": partial(rank_dies, 5),
    "rank_early": partial(rank_dies_early, 4),
    "begun": dies_before_it_began,
    "hangs": hangs,
    "two_hosts": two_hosts,
    "hangup": hangup,
    "memory": memory,
    "ports": ports,
    "diverge": one_rank_diverges,
    "soak": partial(soak, 100_000),
}
SHORT = {
    "USR1 to the launcher": partial(signals, ("the launcher",), ("save",), (signal.SIGUSR1,)),
    "a second Ctrl-C": partial(second_ctrl_c, ("save",), ("the process",)),
    "a second Ctrl-C while one rank waits for the other": partial(second_ctrl_c, ("wait",), ("the launcher",)),
    "a terminal is closed": partial(hangup, ((2, 0),)),
    "nohup": partial(hangup, ((1, 1),)),
    "memory runs out": partial(memory, MEMORY[2:]),
    "ports": ports,
    "kill": partial(kills, 1, in_saves=1, threads=1, undisturbed=1),
    "a rank dies": partial(rank_dies, 1, 1),
    "a start dies before it has begun": partial(dies_before_it_began, (1,)),
    "a process hangs": hangs,
    "a rank dies early": partial(rank_dies_early, 1),
    "NaN on one rank": partial(one_rank_diverges, DIVERGENCES[2:]),
    "soak": lambda shared: soak(2000),  # in a laboratory of its own: it has another model
    "a signal in the first second": partial(signals, ("the process",), ("first second",), (signal.SIGUSR1,)),
    "a full disk": partial(disk_full, 1),
    "order": write_order,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Result]]]:
    shared = Lab(tmp_path_factory.mktemp("faults"))
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(measure, shared=shared) for name, measure in SHORT.items()}


@pytest.mark.parametrize("name", SHORT)
def test_faults_in_short(results, name):
    assert results[name].result().failures == []


def test_the_launcher_refuses_a_folder_in_use_at_once(tmp_path, monkeypatch):
    """Before it starts a process."""
    monkeypatch.setattr(sys, "argv", ["launch", "2", "--checkpoint_dir", str(tmp_path), "--resume", "latest"])
    monkeypatch.setattr(launch, "block_signals", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with lock_folder(tmp_path), pytest.raises(UserError, match="another run is writing there .process "):
        launch.main()


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_faults_in_full(name):
    result = FULL[name]()
    print(f"{name}: {result}")
    assert result.failures == []
