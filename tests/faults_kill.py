"""kill -9, of the trainer at any moment and of one rank, and the order in which a save writes."""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import pytest

from conftest import SRC, run_command
from faults_tools import RESUME, STEPS, WIDE, Lab, Result, Trainer, measurement, newest


@measurement("kill -9 of a run, then --resume latest", WIDE)
def kills(result: Result, here: Lab, count: int, in_saves: int, *, threads: int = 2, undisturbed: int = 7) -> None:
    """Chains of runs, each killed and resumed until it gets to its end; one in four kills at any moment, the others
    while a temporary file is there and has grown to a random size. After every undisturbed-th kill of all chains, a run
    goes to its end."""
    seen = {"kills": 0, "in saves": 0, "chains": 0}
    here.whole(1)
    with ThreadPoolExecutor(threads) as pool:
        while seen["kills"] < count or seen["in saves"] < in_saves:
            list(pool.map(lambda seed: _chain(here, seed, seen, result, undisturbed),
                          range(seen["chains"], seen["chains"] + threads)))
    result.notes = ", ".join(f"{number} {name}" for name, number in seen.items())


def _chain(here: Lab, seed: int, seen: dict[str, int], result: Result, undisturbed: int) -> None:
    choose, folder, saved = random.Random(seed), here.new_folder(), 0
    interval = choose.choice([1, 1, 3])
    first = flags = here.flags("--checkpoint_freq", interval, "--keep_last", 2)
    seen["chains"] += 1
    while True:
        run = Trainer(here, folder, 1, flags)
        _kill(run, choose)
        if run.wait() == 0:
            result.check(f"end of chain {seed}", run.differs())
            break
        seen["kills"] += 1
        seen["in saves"] += any(folder.glob("*.tmp"))
        step, before = newest(folder), max([saved, *run.saved()])
        result.check(f"chain {seed}, kill at step {run.step()}", run.exits(-9),
                     f"{step} after saving {before}" * (step < before),
                     f"{step} after {run.step()} steps" * (run.step() - step > interval))
        saved, flags = step, RESUME if step else first
        if seen["kills"] % undisturbed == 0 and step:
            result.check(f"end of chain {seed}", *run.goes_on())
            break
    shutil.rmtree(folder)


def _kill(run: Trainer, choose: random.Random) -> None:
    if choose.random() < 0.25:
        run.wait_for(lambda run: run.step() > 0, choose.choice([2.0, 60.0]))
        time.sleep(choose.random() * 0.5)
    else:
        saves, size = choose.randrange(1, 4), choose.random() * run.lab.step_bytes
        run.wait_for(lambda run: len(run.saved()) >= saves)
        run.wait_for(lambda run: _temporary_size(run.folder) >= size, 20)
    run.process.kill()


def _temporary_size(folder: Path) -> int:
    with suppress(OSError):  # it has been renamed
        return max((path.stat().st_size for path in folder.glob("*.tmp")), default=0)
    return 0


@measurement("kill -9 of one of two ranks")
def rank_dies(result: Result, here: Lab, times: int, kills: int = 3) -> None:
    """One of two ranks under launch.py is killed, three times in each run, which has to end by itself."""
    result.tried += f", {kills} times a run"
    notes = []
    for number in range(times):
        choose, seconds = random.Random(number), []
        run = here.start(2, "--checkpoint_freq", 2)
        for kill in range(kills):
            run.wait_for(lambda run, kill=kill: run.saved()[-1:] > [5 * kill + 1] and len(run.ranks()) == 2)
            time.sleep(choose.random() * 0.05)
            if ranks := run.ranks():
                os.kill(choose.choice(ranks), signal.SIGKILL)
                killed, said = time.monotonic(), len(run.output())
                run.wait_for(lambda run, said=said: "resumed from" in run.output()[said:])
                seconds.append(f"{time.monotonic() - killed:.0f}")
        code, starts = run.wait(), len(run.lines("model "))
        reasons = {line.strip()[:200] for line in run.output().splitlines() if "Error: " in line}
        said = run.output().count("was killed (SIGKILL), often because memory ran out")
        result.check(f"run {number}", f"exit {code}: {reasons}" * (code != 0), f"said {said} times" * (said != kills),
                     f"{starts} starts" * (starts != kills + 1), run.differs(), run.orphans())
        notes.append(f"started again after {', '.join(seconds)} s")
    result.notes = "; ".join(notes)


MEMORY = ((1, [0]), (2, [0]), (2, [1]), (2, [0, 1]))  # processes, and the ranks whose memory runs out


@measurement("memory that runs out")
def memory(result: Result, here: Lab, cases: Sequence[tuple[int, list[int]]] = MEMORY) -> None:
    """torch.OutOfMemoryError in a step, on one process, one of two, both: one line, one start, and its advice helps."""
    for processes, ranks in cases:
        run = here.start(processes, "--checkpoint_freq", 2, full=6, ranks=ranks, launcher=1)
        wrong, said = run.exits(2), [line for line in run.output().splitlines() if "rror" in line]
        advice = re.search("out of memory on cpu: go on with (--resume auto --mini_batch_size 1);", "".join(said))
        result.check(f"{processes} processes, ranks {ranks}", wrong, f"said {said}" * (len(said) != 1 or not advice),
                     "several starts" * (len(run.lines("model ")) != 1), "more lines" * ("Many more" in run.output()),
                     run.orphans(), run.again(advice[1].split() if advice else []).exits(0),
                     "no end" * (newest(run.folder) != STEPS))


@measurement("kill -9 of one of two ranks before the first checkpoint")
def rank_dies_early(result: Result, here: Lab, times: int) -> None:
    """One of two ranks is killed before the first checkpoint: the run ends at once, with one line that says so."""
    for number in range(times):
        run = here.start(2, "--checkpoint_freq", 100, phase="step", at=2, seconds=3)
        run.wait_for(Trainer.stopped)
        os.kill(run.ranks()[number % 2], signal.SIGKILL)
        wrong, starts = run.exits(1), len(run.lines("model "))
        said = run.output().count("no new checkpoint was saved before that")
        result.check(f"rank {number % 2}", wrong, f"{starts} starts" * (starts != 1),
                     f"said {said} times" * (said != 1), run.orphans())


@measurement("kill -9 before a start has begun")
def dies_before_it_began(result: Result, here: Lab, processes: Sequence[int] = (1, 2)) -> None:
    """A run that goes back to an older step is killed in its set-up: the next start goes back there, as was asked."""
    for count in processes:
        first = here.start(count)
        wrong, back = first.exits(0), first.folder / "step_000012.pt"
        run = Trainer(here, first.folder, count, ["--resume", str(back)], {"dies": 0, "launcher": 1})
        result.check(f"{count} processes", wrong, run.exits(0), run.differs(), run.orphans(),
                     *(f"no {text}" * (text not in run.output()) for text in ("was killed (SIGKILL)", f"{back} at")))


@measurement("a process that hangs")
def hangs(result: Result, here: Lab) -> None:
    """The launcher says that no step ends (here after two seconds), and the run goes on when one does; also where the
    launcher was stopped for a while, as by Ctrl-Z and fg."""
    run = here.start(1, "--checkpoint_freq", 100, phase="step", at=5, seconds=5, launcher=1, quiet=2)
    run.wait_for(Trainer.stopped)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    run.process.send_signal(signal.SIGCONT)
    result.check("one process", run.exits(0), run.differs(),
                 "not said" * ("warning: no step has ended for" not in run.output()))


@measurement("system calls of every save, traced")
def write_order(result: Result, here: Lab) -> None:
    """Every save of a run, as strace sees it."""
    if not shutil.which("strace"):
        pytest.skip("needs strace (apt install strace)")
    folder, trace = here.new_folder(), here.folder / "trace"
    calls = "trace=openat,open,creat,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    logs = here.folder / "tb"
    flags = here.flags("--keep_last", 2, "--max_steps", 8, "--checkpoint_dir", folder, "--tensorboard_dir", logs)
    run = run_command("strace", "-f", "-y", "-o", trace, "-e", calls, sys.executable, SRC / "train_instruct.py", *flags,
                      timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert run.code == 0, run.stderr
    events = _events(trace.read_text(), str(folder))
    for step in range(1, 9):
        result.check(f"step {step}", *_save_complaints(events, folder, step))
    result.check("best_model.pt", *_file_complaints(events, "best_model.pt"))
    elsewhere = [path for _, path in events if path.endswith(".tmp") and "/" in path]
    result.check("temporary files", f"outside the folder: {elsewhere[:1]}" * bool(elsewhere))


def _events(trace: str, folder: str) -> list[tuple[str, str]]:
    """(call, path) of the calls that concern the folder, in their order: 'write' and 'read' for how a file is opened,
    'from > to' for renames and links, names alone for what is in the folder."""
    events = []
    for line in trace.splitlines():
        if folder not in line or " = -1" in line or "resumed>" in line:
            continue
        call = re.sub(r"^\d+ +", "", line).partition("(")[0].removesuffix("at")
        line = line.replace(f"{folder}/", "")
        paths = re.findall(r'"([^"]+)"', line) or re.findall(r"<([^>]+)>", line)
        if call in ("open", "creat"):
            call = "write" if "O_CREAT" in line or "O_WRONLY" in line else "read"
        elif call.startswith(("rename", "link")):
            call, paths = call[:4], [" > ".join(paths[:2])]
        events.append((call, paths[0]))
    return events


def _file_complaints(events: list[tuple[str, str]], name: str) -> list[str]:
    """The four things that make a file durable, in their order."""
    wanted = [("write", f"{name}.tmp"), ("fsync", f"{name}.tmp"), ("rena", f"{name}.tmp > {name}")]
    places = [events.index(entry) for entry in wanted if entry in events]
    if len(places) < 3 or places != sorted(places):
        return [f"{name} is not written, synced and renamed"]
    after = takewhile(lambda event: event[0] != "rena", events[places[2] + 1:])
    return ["the folder is not synced"] * (not any(call == "fsync" and path.startswith("/") for call, path in after))


def _save_complaints(events: list[tuple[str, str]], folder: Path, step: int) -> list[str]:
    """Write, sync, rename, sync the folder, latest.pt, sync it again, only then remove the old one, sync."""
    name, synced = f"step_{step:06d}.pt", ("fsync", str(folder))
    if complaints := _file_complaints(events, name):
        return complaints
    rest = takewhile(lambda event: event != ("write", f"step_{step + 1:06d}.pt.tmp"), events)
    wanted = [("rena", f"{name}.tmp > {name}"), synced, ("link", f"{name} > latest.pt.tmp"),
              ("rena", "latest.pt.tmp > latest.pt"), synced, *[("unlink", f"step_{step - 2:06d}.pt")] * (step > 2),
              synced]
    return [f"no {call} {path} in its place" for call, path in wanted if (call, path) not in rest][:1]
