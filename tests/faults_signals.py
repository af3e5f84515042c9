"""SIGINT, SIGTERM and SIGUSR1 in every phase of a run, to one process, to ranks of two, and to their launcher."""

import os
import random
import signal
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from faults_tools import STEPS, Lab, Result, Trainer, lab, newest, orphans, wait_for
from weights import checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PHASES = ("first second", "step", "accumulation", "evaluation", "save", "sampling")
TARGETS = ("the process", "one rank", "all ranks", "the launcher")
PATIENCE = 30  # seconds from a signal to the end of the run


def signals(phases: tuple[str, ...] = PHASES, targets: tuple[str, ...] = TARGETS,
            numbers: tuple[int, ...] = SIGNALS, shared: Lab | None = None) -> Result:
    """Every signal in every phase at every target; each run is then resumed to its end."""
    result = Result("a signal, then --resume latest")
    slowest = 0.0
    with lab(shared) as here:
        for seed, (target, phase, number) in enumerate(product(targets, phases, numbers)):
            name = f"{signal.Signals(number).name} to {target}, {phase}"
            complaints, seconds = _one_signal(here, target, phase, number, random.Random(seed))
            result.check(name, *complaints)
            slowest = max(slowest, seconds)
    result.notes = f"slowest end {slowest:.1f} s after the signal"
    return result


def _one_signal(here: Lab, target: str, phase: str, number: int, choose: random.Random) -> tuple[list[str], float]:
    processes = 1 if target == "the process" else 2
    folder, fault = here.new_folder(), None
    if phase != "first second":
        fault = {"phase": phase, "at": choose.randrange(2, 5) if phase != "sampling" else choose.randrange(2, 40),
                 "seconds": 1.0, "marker": f"{folder}.marker"}
    flags = here.flags("--checkpoint_freq", 2 if phase == "save" else 100)
    run = Trainer(here, folder, processes, flags, fault)
    if fault:
        wait_for(lambda: os.path.exists(fault["marker"] + ".0"), run)
    else:
        wait_for(lambda: target == "the launcher" or len(run.ranks()) == processes, run)
    time.sleep(0.1 + 0.6 * choose.random())
    at, before, sent = run.step(), len(run.saved()), time.monotonic()
    ranks = run.ranks()
    for pid in {"one rank": [choose.choice(ranks)] if ranks else [], "the launcher": [run.process.pid]}.get(target,
                                                                                                           ranks):
        os.kill(pid, number)
    code = run.wait()
    seconds = 0.0 if number == signal.SIGUSR1 else time.monotonic() - sent
    wanted = 0 if number == signal.SIGUSR1 else 128 + number
    complaints = [f"exit {code}: {run.output()[-300:]}" * (code != wanted), orphans(run.folder),
                  f"it took {seconds:.0f} s" * (seconds > PATIENCE), "a traceback" * ("Traceback" in run.output())]
    if fault:
        saved = run.saved()[before:][:2]  # a save that was going on when the signal came is told after it
        complaints.append(f"saved {saved} after step {at}" * (not any(at <= step <= at + 1 for step in saved)
                                                              or (number != signal.SIGUSR1 and saved[-1] > at + 1)))
    if code:
        flags = ["--resume", "latest"] if newest(run.folder) else flags
        complaints.append(f"resumed: exit {code}" * ((code := Trainer(here, run.folder, processes, flags).wait()) != 0))
    return [*complaints, here.differs(run.folder, processes)], seconds


def second_ctrl_c(times: int, targets: tuple[str, ...] = ("the process", "the launcher", "one rank"),
                  shared: Lab | None = None) -> Result:
    """Two SIGINT, 1.2 s apart, while a save (or a step) would go on for another minute."""
    result, slowest = Result("a second Ctrl-C, in a save or a step that takes a minute"), 0.0
    with lab(shared) as here:
        for number, target in product(range(times), targets):
            processes, phase = 1 if target == "the process" else 2, ("save", "step")[number % 2]
            folder = here.new_folder()
            marker = f"{folder}.marker"
            run = Trainer(here, folder, processes, here.flags("--checkpoint_freq", 2),
                          {"phase": phase, "at": 5, "seconds": 60, "marker": marker})
            wait_for(lambda marker=marker: os.path.exists(marker + ".0"), run)
            before = newest(run.folder)
            pid = {"the launcher": run.process.pid}.get(target, run.ranks()[0])
            os.kill(pid, signal.SIGINT)
            time.sleep(1.2)
            alive, sent = run.process.poll() is None, time.monotonic()
            os.kill(pid, signal.SIGINT)
            code = run.wait()
            seconds = time.monotonic() - sent
            slowest = max(slowest, seconds)
            complaints = ["the first one ended it" * (not alive), f"exit {code}" * (code != 130), orphans(run.folder),
                          f"it took {seconds:.0f} s" * (seconds > 15),
                          "the last checkpoint is lost" * (newest(run.folder) < before)]
            code = Trainer(here, run.folder, processes, ["--resume", "latest"]).wait()
            result.check(f"{target}, {phase}", *complaints, f"resumed: exit {code}" * (code != 0),
                         here.differs(run.folder, processes))
    result.notes = f"slowest end {slowest:.1f} s after the second"
    return result


def two_runs(times: int, processes: tuple[int, ...] = (1, 2)) -> Result:
    """A second run on the folder of a running one, and a run after the first was killed."""
    result, slowest = Result("two runs on one folder"), 0.0
    with lab() as here:
        for number, count in product(range(times), processes):
            first = Trainer(here, here.new_folder(), count, here.flags("--checkpoint_freq", 5, "--keep_last", 2),
                            {"phase": "step", "at": 8, "seconds": 600, "marker": str(here.folder / "m")})
            wait_for(lambda first=first: first.step() >= 7, first)
            holder = (first.folder / ".lock").read_text().strip()
            second = Trainer(here, first.folder, count, ["--resume", "latest"])
            code = second.wait()
            seconds = time.monotonic() - second.begin
            slowest = max(slowest, seconds)
            told = [line for line in second.output().splitlines() if line.startswith("error: ")]
            complaints = [f"exit {code}" * (code != 2), f"it took {seconds:.1f} s" * (seconds > 5),
                          f"told {told}" * (len(told) != 1 or holder not in told[0]),
                          f"rank 0 is {first.ranks()[0]}, not {holder}" * (f"{first.ranks()[0]} " not in holder)]
            for pid in (first.process.pid, *first.ranks()):
                os.kill(pid, signal.SIGKILL)
            first.process.wait()
            while orphans(first.folder):  # the ranks have the signal, and hold the folder until they are gone
                time.sleep(0.05)
            code = Trainer(here, first.folder, count, ["--resume", "latest"]).wait()
            result.check(f"{count} processes, {number}", *complaints, f"afterwards: exit {code}" * (code != 0),
                         here.differs(first.folder, count))
    result.notes = f"slowest refusal {slowest:.1f} s"
    return result


DIVERGENCES = (([5], False), ([5, 6, 9], False), ([9, 10, 11], True))  # bad steps, and whether they end the run


def one_rank_diverges(cases: Sequence[tuple[list[int], bool]] = DIVERGENCES, shared: Lab | None = None) -> Result:
    """NaN in the loss of rank 1 of two: once, and in three steps in a row."""
    result = Result("NaN in the loss of one of two ranks")
    with lab(shared) as here:
        for bad, ends in cases:
            folder = here.new_folder()
            marker = f"{folder}.hashes"
            run = Trainer(here, folder, 2, here.flags(), {"nan": bad, "rank": 1, "marker": marker})
            code = run.wait()
            hashes = [dict(line.split() for line in Path(f"{marker}.{rank}").read_text().splitlines())
                      for rank in (0, 1)]
            told = [step for step in range(1, STEPS + 1) if f"\nstep {step} skipped: loss nan" in run.output()]
            error = f"3 steps in a row, up to step 11; the last good checkpoint is {run.folder}/step_000010.pt"
            finite = all(tensor.isfinite().all() for path in run.folder.glob("*.pt")
                         for tensor in checkpoint.load(path)["model"].values())
            result.check(f"steps {bad}", f"exit {code}" * (code != (4 if ends else 0)),
                         "the ranks differ" * (hashes[0] != hashes[1]), f"told of {told}" * (told != bad),
                         "no example ids" * (run.output().count("; train examples [") != len(bad)),
                         "the optimizer moved" * any(hashes[0][str(step)] != hashes[0][str(step - 1)] for step in bad),
                         "no checkpoint is named" * (ends and error not in run.output()),
                         "not finite in a checkpoint" * (not finite), orphans(run.folder))
    return result
