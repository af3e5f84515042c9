"""SIGINT, SIGTERM and SIGUSR1 in every phase of a run, to one process, to ranks of two, and to their launcher."""

import os
import random
import signal
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from faults_tools import RESUME, STEPS, Lab, Result, Trainer, measurement, newest
from weights import checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PHASES = ("first second", "step", "accumulation", "evaluation", "save", "sampling")
PATIENCE = 30  # seconds from a signal to the end of the run


@measurement("a signal, then --resume latest")
def signals(result: Result, here: Lab, targets: tuple[str, ...], phases: tuple[str, ...] = PHASES,
            numbers: tuple[int, ...] = SIGNALS) -> None:
    """Every signal in every phase at every target; each run is then resumed to its end."""
    slowest = 0.0
    for seed, (target, phase, number) in enumerate(product(targets, phases, numbers)):
        complaints, seconds = _one_signal(here, target, phase, number, random.Random(seed))
        result.check(f"{signal.Signals(number).name} to {target}, {phase}", *complaints)
        slowest = max(slowest, seconds)
    result.notes = f"slowest end {slowest:.1f} s after the signal"


def _one_signal(here: Lab, target: str, phase: str, number: int, choose: random.Random) -> tuple[list[str], float]:
    processes, fault = 1 if target == "the process" else 2, {}
    if phase != "first second":
        # what comes before the first step is no case, as there is nothing to save yet: 63 tokens, 3 or 5 micro-batches
        at = choose.randrange(*{"sampling": (64, 120), "evaluation": (6, 12)}.get(phase, (2, 5)))
        fault = {"phase": phase, "at": at, "seconds": 1.0}
    run = here.start(processes, "--checkpoint_freq", 2 if phase == "save" else 100, **fault)
    run.wait_for(Trainer.stopped if fault else lambda run: target == "the launcher" or len(run.ranks()) == processes)
    time.sleep(0.1 + 0.6 * choose.random())
    at, before, sent, ranks = run.step(), len(run.saved()), time.monotonic(), run.ranks()
    aims = {"one rank": [choose.choice(ranks)] if ranks else [], "the launcher": [run.process.pid]}
    for pid in aims.get(target, ranks):
        os.kill(pid, number)
    code, goes_on = run.wait(), number == signal.SIGUSR1
    seconds = 0.0 if goes_on else time.monotonic() - sent
    complaints = [run.exits(0 if goes_on else 128 + number), run.orphans(),
                  f"it took {seconds:.0f} s" * (seconds > PATIENCE), "a traceback" * ("Traceback" in run.output())]
    if fault:
        saved = run.saved()[before:][:2]  # a save that was going on when the signal came is said after it
        complaints.append(f"saved {saved} after step {at}" * (not any(at <= step <= at + 1 for step in saved)
                                                              or (not goes_on and saved[-1] > at + 1)))
    ending = run.goes_on(RESUME if newest(run.folder) else run.flags) if code else [run.differs()]
    return [*complaints, *ending], seconds


@measurement("a terminal that is closed")
def hangup(result: Result, here: Lab, cases: Sequence[tuple[int, int]] = ((1, 1), (1, 0), (2, 1), (2, 0))) -> None:
    """SIGHUP to all processes of a run, which nohup has them ignore; without nohup it saves and leaves."""
    for processes, nohup in cases:
        run = here.start(processes, "--checkpoint_freq", 100, phase="step", at=6, seconds=3, nohup=nohup, launcher=1)
        run.wait_for(Trainer.stopped)
        for pid in (run.process.pid, *run.ranks()):
            os.kill(pid, signal.SIGHUP)
        wrong = run.exits(0 if nohup else 129)
        saved = [] if nohup else [f"saved {newest(run.folder)}" * (newest(run.folder) != 6), *run.goes_on()]
        result.check(f"{processes} processes, nohup {nohup}", wrong, *saved, run.differs(), run.orphans())


@measurement("a second Ctrl-C, in a save or step that takes a minute, or while one process waits for another for ever")
def second_ctrl_c(result: Result, here: Lab, phases: Sequence[str] = ("save", "step", "wait"),
                  targets: tuple[str, ...] = ("the process", "the launcher", "one rank")) -> None:
    """Two SIGINT, 1.2 s apart, while a save (or a step) would go on for another minute, or for ever."""
    slowest = 0.0
    for phase, target in product(phases, targets):
        processes, waits = 1 if target == "the process" else 2, phase == "wait"
        run = here.start(processes, "--checkpoint_freq", 2, phase="step" if waits else phase, at=5,
                         seconds=1 if waits and processes == 2 else 60)
        run.wait_for(Trainer.stopped)
        if waits and processes == 2:
            os.kill(run.ranks()[1], signal.SIGSTOP)
            time.sleep(2)
        before, pid = newest(run.folder), run.process.pid if target == "the launcher" else run.ranks()[0]
        os.kill(pid, signal.SIGINT)
        time.sleep(1.2)
        alive, sent = run.process.poll() is None, time.monotonic()
        os.kill(pid, signal.SIGINT)
        wrong, seconds = run.exits(130), time.monotonic() - sent
        slowest = max(slowest, seconds)
        result.check(f"{target}, {phase}", "the first one ended it" * (not alive), wrong,
                     run.orphans(), f"it took {seconds:.0f} s" * (seconds > 15),
                     "the last checkpoint is lost" * (newest(run.folder) < before), *run.goes_on())
    result.notes = f"slowest end {slowest:.1f} s after the second"


DIVERGENCES = (([5], 0), ([5, 6, 9], 0), ([9, 10, 11], 4))  # bad steps, and the exit code


@measurement("NaN in the loss of one of two ranks")
def one_rank_diverges(result: Result, here: Lab, cases: Sequence[tuple[list[int], int]] = DIVERGENCES) -> None:
    """NaN in the loss of rank 1 of two: once, and in three steps in a row."""
    for bad, wanted in cases:
        run = here.start(2, nan=bad, rank=1)
        wrong = run.exits(wanted)
        hashes = [dict(map(str.split, Path(f"{run.marker}.{rank}").read_text().splitlines())) for rank in (0, 1)]
        said = [step for step in range(1, STEPS + 1) if f"\nstep {step} skipped: loss nan" in run.output()]
        error = f"3 steps in a row, up to step 11; the last good checkpoint is {run.folder}/step_000008.pt"
        finite = all(tensor.isfinite().all() for path in run.folder.glob("*.pt")
                     for tensor in checkpoint.load(path)["model"].values())
        result.check(f"steps {bad}", wrong, "the ranks differ" * (hashes[0] != hashes[1]),
                     f"said of {said}" * (said != bad),
                     "no example ids" * (run.output().count("; train examples [") != len(bad)),
                     "the optimizer moved" * any(hashes[0][str(step)] != hashes[0][str(step - 1)] for step in bad),
                     "no checkpoint is named" * (wanted != 0 and error not in run.output()),
                     "not finite in a checkpoint" * (not finite), run.orphans())
