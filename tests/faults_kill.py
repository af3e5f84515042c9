"""kill -9, of the trainer at any moment and of one rank, and the order in which a save writes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from conftest import SRC
from faults_tools import WIDE, Lab, Result, Trainer, lab, newest, orphans, wait_for


def kills(count: int, in_saves: int, *, threads: int = 2, undisturbed: int = 7, shared: Lab | None = None) -> Result:
    """Chains of runs, each killed and resumed until it gets to its end; one in four kills at any moment, the others
    while a temporary file is there and has grown to a random size. After every undisturbed-th kill of all chains, a run
    goes to its end."""
    result = Result("kill -9 of a run, then --resume latest")
    seen = {"kills": 0, "in saves": 0, "chains": 0}
    with lab(shared, WIDE) as here:
        here.whole(1)
        with ThreadPoolExecutor(threads) as pool:
            while seen["kills"] < count or seen["in saves"] < in_saves:
                list(pool.map(lambda seed: _chain(here, seed, seen, result, undisturbed),
                              range(seen["chains"], seen["chains"] + threads)))
    result.notes = ", ".join(f"{number} {name}" for name, number in seen.items())
    return result


def _chain(here: Lab, seed: int, seen: dict[str, int], result: Result, undisturbed: int) -> None:
    choose, folder = random.Random(seed), here.new_folder()
    interval = choose.choice([1, 1, 3])
    flags, at_end, saved = here.flags("--checkpoint_freq", interval, "--keep_last", 2), False, 0
    seen["chains"] += 1
    while not at_end:
        run = Trainer(here, folder, 1, flags)
        if choose.random() < 0.25:
            wait_for(lambda run=run: run.step() > 0, run, choose.choice([2.0, 60.0]))
            time.sleep(choose.random() * 0.5)
        else:
            saves, size = choose.randrange(1, 4), choose.random() * here.step_bytes
            wait_for(lambda run=run, saves=saves: len(run.saved()) >= saves, run)
            wait_for(lambda size=size: _temporary_size(folder) >= size, run, 20)
        run.process.kill()
        if run.wait() == 0:
            at_end = True
            result.check(f"end of chain {seed}", here.differs(folder, 1))
            break
        in_save = any(folder.glob("*.tmp"))
        step, before = newest(folder), max([saved, *run.saved()])
        seen["kills"] += 1
        seen["in saves"] += in_save
        result.check(f"chain {seed}, kill at step {run.step()}",
                     f"exit {run.wait()}" * (run.wait() != -9), f"{step} after saving {before}" * (step < before),
                     f"{step} after {run.step()} steps" * (run.step() - step > interval))
        saved = step
        flags = ["--resume", "latest"] if step else here.flags("--checkpoint_freq", interval, "--keep_last", 2)
        if seen["kills"] % undisturbed == 0 and step:
            run = Trainer(here, folder, 1, flags)
            at_end = run.wait() == 0
            result.check(f"end of chain {seed}", here.differs(folder, 1), "" if at_end else run.output()[-300:])
            break
    shutil.rmtree(folder)


def _temporary_size(folder: Path) -> int:
    sizes = [0]
    for path in folder.glob("*.tmp"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue
    return max(sizes)


def rank_dies(times: int, kills: int = 3, shared: Lab | None = None) -> Result:
    """One of two ranks under launch.py is killed, three times in each run, which has to end by itself."""
    result = Result(f"kill -9 of one of two ranks, {kills} times a run")
    with lab(shared) as here:
        for number in range(times):
            choose, seconds = random.Random(number), []
            run = Trainer(here, here.new_folder(), 2, here.flags("--checkpoint_freq", 2))
            for kill in range(kills):
                wait_for(lambda run=run, kill=kill: run.saved()[-1:] > [5 * kill + 1] and len(run.ranks()) == 2, run)
                time.sleep(choose.random() * 0.05)
                ranks = run.ranks()
                if ranks:
                    os.kill(choose.choice(ranks), signal.SIGKILL)
                    seconds.append(time.monotonic())
                    told = len(run.output())
                    wait_for(lambda run=run, told=told: "resumed from" in run.output()[told:], run)
                    seconds[-1] = time.monotonic() - seconds[-1]
            code = run.wait()
            starts = run.output().count("\nmodel ") + run.output().startswith("model ")
            reasons = {line.strip()[:200] for line in run.output().splitlines() if "Error: " in line}
            result.check(f"run {number}", f"exit {code}: {reasons}" * (code != 0),
                         f"{starts} starts" * (starts != kills + 1), here.differs(run.folder, 2), orphans(run.folder))
            result.notes += f"started again after {', '.join(f'{each:.0f}' for each in seconds)} s; "
    result.notes = result.notes.removesuffix("; ")
    return result


def rank_dies_early(times: int, shared: Lab | None = None) -> Result:
    """One of two ranks is killed before the first checkpoint: the run ends at once, with one line that says so."""
    result = Result("kill -9 of one of two ranks before the first checkpoint")
    with lab(shared) as here:
        for number in range(times):
            marker = f"{here.new_folder()}.marker"
            run = Trainer(here, here.new_folder(), 2, here.flags("--checkpoint_freq", 100),
                          {"phase": "step", "at": 2, "seconds": 3, "marker": marker})
            wait_for(lambda marker=marker: os.path.exists(marker + ".0"), run)
            os.kill(run.ranks()[number % 2], signal.SIGKILL)
            code, out = run.wait(), run.output()
            starts = out.count("\nmodel ") + out.startswith("model ")
            told = out.count("error: a process of the run died")
            result.check(f"rank {number % 2}", f"exit {code}" * (code != 1), f"{starts} starts" * (starts != 1),
                         f"told {told} times" * (told != 1), orphans(run.folder))
    return result


def write_order(shared: Lab | None = None) -> Result:
    """Every save of a run, as strace sees it."""
    result = Result("system calls of every save, traced")
    with lab(shared) as here:
        folder, trace = here.new_folder(), here.folder / "trace"
        calls = "trace=openat,open,creat,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
        flags = here.flags("--keep_last", 2, "--max_steps", 8, "--checkpoint_dir", folder, "--tensorboard_dir",
                           here.folder / "tb")
        subprocess.run(["strace", "-f", "-y", "-o", str(trace), "-e", calls, sys.executable,
                        str(SRC / "train_instruct.py"), *flags], check=True, capture_output=True, timeout=240,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        events = _events(trace.read_text(), str(folder))
        for step in range(1, 9):
            result.check(f"step {step}", *_save_complaints(events, folder, step))
        best = [call for call in events if "best_model.pt" in call[1]]
        result.check("best_model.pt", *_file_complaints(events, "best_model.pt"), "" if best else "never written")
        elsewhere = [path for _, path in events if path.endswith(".tmp") and "/" in path]
        result.check("temporary files", f"outside the folder: {elsewhere[:1]}" * bool(elsewhere))
    return result


def _events(trace: str, folder: str) -> list[tuple[str, str]]:
    """(call, path) of the calls that concern the folder, in their order: 'write' and 'read' for how a file is opened,
    'from > to' for renames and links, names alone for what is in the folder."""
    events = []
    for line in trace.splitlines():
        if folder not in line or " = -1" in line or "resumed>" in line:
            continue
        call = re.sub(r"^\d+ +", "", line).partition("(")[0]
        paths = re.findall(r'"([^"]+)"', line) or re.findall(r"<([^>]+)>", line)
        if call in ("open", "openat", "creat"):
            events.append(("write" if "O_CREAT" in line or "O_WRONLY" in line else "read", paths[0]))
        elif call.startswith(("rename", "link")):
            events.append((call[:4], f"{Path(paths[0]).name} > {Path(paths[1]).name}"))
        else:
            events.append((call.removesuffix("at"), paths[0]))
    return [(call, path if path.count("/") == 0 or Path(path).parent != Path(folder) else Path(path).name)
            for call, path in events]


def _file_complaints(events: list[tuple[str, str]], name: str) -> list[str]:
    """The four things that make a file durable, in their order."""
    wanted = [("write", f"{name}.tmp"), ("fsync", f"{name}.tmp"), ("rena", f"{name}.tmp > {name}")]
    missing = [f"no {call} {path}" for call, path in wanted if (call, path) not in events]
    if missing:
        return missing
    places = [events.index(entry) for entry in wanted]
    after = [call for call, path in takewhile(lambda event: event[0] != "rena", events[places[2] + 1:])
             if path.startswith("/")]  # the folder's
    return ["wrong order"] * (places != sorted(places)) + ["the folder is not synced"] * ("fsync" not in after)


def _save_complaints(events: list[tuple[str, str]], folder: Path, step: int) -> list[str]:
    """Write, sync, rename, sync the folder, latest.pt, sync it again, only then remove the old one, sync."""
    name = f"step_{step:06d}.pt"
    complaints = _file_complaints(events, name)
    if complaints:
        return complaints
    following = ("write", f"step_{step + 1:06d}.pt.tmp")
    events = events[:events.index(following)] if following in events else events
    start = events.index(("rena", f"{name}.tmp > {name}"))
    wanted = [("fsync", str(folder)), ("link", f"{name} > latest.pt.tmp"), ("rena", "latest.pt.tmp > latest.pt"),
              ("fsync", str(folder))]
    if step > 2:
        wanted.append(("unlink", f"step_{step - 2:06d}.pt"))
    wanted.append(("fsync", str(folder)))
    for entry in wanted:
        if entry not in events[start:]:
            return [f"no {entry[0]} {entry[1]} in its place"]
        start = events.index(entry, start) + 1
    return []
