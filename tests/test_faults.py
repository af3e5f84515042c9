"""Kills, signals, a full disk, a NaN on one rank: a short form of each measurement of faults.py, and the long (slow).

The short forms run two at a time: most of their time goes into starting Python.
"""

import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from conftest import run_launcher
from faults import FAULTS
from faults_disk import disk_full, soak
from faults_kill import kills, rank_dies, rank_dies_early, write_order
from faults_signals import DIVERGENCES, one_rank_diverges, second_ctrl_c, signals
from faults_tools import Lab, Result
from weights.durable import lock_folder

SHORT = {
    "USR1 to the launcher": lambda lab: signals(("save",), ("the launcher",), (signal.SIGUSR1,), lab),
    "a second Ctrl-C": lambda lab: second_ctrl_c(1, ("the process",), lab),
    "kill": lambda lab: kills(1, in_saves=1, threads=1, undisturbed=1, shared=lab),
    "a rank dies": lambda lab: rank_dies(1, 1, lab),
    "a rank dies early": lambda lab: rank_dies_early(1, lab),
    "NaN on one rank": lambda lab: one_rank_diverges(DIVERGENCES[2:], lab),
    "soak": lambda _: soak(2000),
    "a signal in the first second": lambda lab: signals(("first second",), ("the process",), (signal.SIGUSR1,), lab),
    "a full disk": lambda lab: disk_full(1, lab),
}
if shutil.which("strace"):
    SHORT["the order of a save"] = write_order


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Result]]]:
    shared = Lab(tmp_path_factory.mktemp("faults"))
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(measure, shared) for name, measure in SHORT.items()}


@pytest.mark.parametrize("name", [*SHORT, *({"the order of a save"} - SHORT.keys())])
def test_faults_in_short(results, name):
    if name not in results:
        pytest.skip("no strace here")
    assert results[name].result().failures == []


def test_the_launcher_refuses_a_folder_in_use_at_once(tmp_path):
    with lock_folder(tmp_path):
        begin = time.monotonic()
        code, _, stderr = run_launcher("2", "--checkpoint_dir", str(tmp_path), "--resume", "latest")
        assert (code, stderr.count("\n")) == (2, 1) and "another run is writing there (process " in stderr
        assert time.monotonic() - begin < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_full(name):
    if name == "order" and not shutil.which("strace"):
        pytest.skip("no strace here")
    assert FAULTS[name]().failures == []
