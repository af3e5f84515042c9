"""Kills, signals, a full disk, a NaN on one rank: a short form of each measurement, and the long (slow), which
faults.py runs.

What was not as it should be is said at once, then how many cases were. The short forms run two at a time: most of their
time goes into starting Python.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

import faults_runs as runs
from faults_hosts import ports, two_hosts
from faults_tools import Lab, Result

FULL = {
    "kill": partial(runs.kills, 200, in_saves=100),
    "order": runs.write_order,
    "disk": partial(runs.disk_full, 20),
    "signals_1": partial(runs.signals, ("the process",)),
    "signals_2": partial(runs.signals, ("one rank", "all ranks", "the launcher")),
    "second": runs.second_ctrl_c,
    "rank": partial(runs.rank_dies, 5),
    "rank_early": partial(runs.rank_dies_early, 4),
    "rank_saves": partial(runs.rank_dies_in_save, 3),
    "begun": runs.dies_before_it_began,
    "hangs": runs.hangs,
    "two_hosts": two_hosts,
    "hangup": runs.hangup,
    "memory": runs.memory,
    "ports": ports,
    "diverge": runs.one_rank_diverges,
    "soak": partial(runs.soak, 100_000),
}
SHORT = {
    "USR1 to the launcher": partial(runs.signals, ("the launcher",), ("save",), (signal.SIGUSR1,)),
    "a second Ctrl-C": partial(runs.second_ctrl_c, ("save",), ("the process",)),
    "a second Ctrl-C while one rank waits for the other": partial(runs.second_ctrl_c, ("wait",), ("the launcher",)),
    "a terminal is closed": partial(runs.hangup, ((2, 0),)),
    "nohup": partial(runs.hangup, ((1, 1),)),
    "memory runs out": partial(runs.memory, runs.MEMORY[2:]),
    "ports": ports,
    "kill": partial(runs.kills, 1, in_saves=1, threads=1, undisturbed=1),
    "a rank dies": partial(runs.rank_dies, 1, 1),
    "a start dies before it has begun": partial(runs.dies_before_it_began, (1,)),
    "a process hangs": runs.hangs,
    "a rank dies while the other saves": partial(runs.rank_dies_in_save, 1),
    "a rank dies early": partial(runs.rank_dies_early, 1),
    "NaN on one rank": partial(runs.one_rank_diverges, runs.DIVERGENCES[1:]),
    "soak": lambda shared: runs.soak(2000),  # in a laboratory of its own: it has another model
    "a signal in the first second": partial(runs.signals, ("the process",), ("first second",), (signal.SIGUSR1,)),
    "a full disk": partial(runs.disk_full, 1),
    "order": runs.write_order,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Result]]]:
    shared = Lab(tmp_path_factory.mktemp("faults"))
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(measure, shared=shared) for name, measure in SHORT.items()}


@pytest.mark.parametrize("name", SHORT)
def test_faults_in_short(results, name):
    assert results[name].result().failures == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_faults_in_full(name):
    result = FULL[name]()
    print(f"{name}: {result}")
    assert result.failures == []
