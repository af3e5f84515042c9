"""What goes wrong with a run on one host: kill -9, of the trainer at any moment and of one rank; SIGINT, SIGTERM and
SIGUSR1 in every phase, to one process, to ranks of two, and to their launcher; memory or a disk that is full, a NaN;
also the order in which a save writes, and a run so long that any leak would show."""

import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product, takewhile
from pathlib import Path

import pytest

from conftest import SRC, run_command
from faults_tools import RESUME, STEPS, WIDE, Lab, Result, Trainer, measurement, newest
from model import GPTConfig
from models import small_model, write_pretrained
from weights import checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PHASES = ("first second", "step", "accumulation", "evaluation", "save", "sampling")
PATIENCE = 30  # seconds from a signal to the end of the run
STEP_BYTES = 1_120_000  # of a step file of the small model


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
        said = [line for line in run.output().splitlines() if "rror: " in line]
        is_right = len(said) == 1 and "no new checkpoint was saved before that" in said[0]
        result.check(f"rank {number % 2}", wrong, f"{starts} starts" * (starts != 1),
                     f"said {said}" * (not is_right), run.orphans())


@measurement("kill -9 of a rank while the other saves")
def rank_dies_in_save(result: Result, here: Lab, times: int) -> None:
    """The save, which takes longer than a process has to end in, is finished, and the run goes on from it."""
    for number in range(times):
        run = here.start(2, "--checkpoint_freq", 4, phase="save", at=1, seconds=2.5, grace=0.5)
        run.wait_for(Trainer.stopped)
        os.kill(run.ranks()[1], signal.SIGKILL)
        result.check(f"run {number}", run.exits(0), run.differs(), run.orphans(),
                     "not resumed" * ("resumed from" not in run.output()))


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


DIVERGENCES = (([5], 0), ([3, 4, 6, 7], 0), ([9, 10, 11], 4))  # bad steps, at 4 an evaluation too; the exit code


@measurement("NaN in the loss of one of two ranks")
def one_rank_diverges(result: Result, here: Lab, cases: Sequence[tuple[list[int], int]] = DIVERGENCES) -> None:
    """NaN in the loss of rank 1 of two: once, in twos, and in three steps in a row. Nothing is saved amid them."""
    for bad, wanted in cases:
        run = here.start(2, nan=bad, rank=1)
        wrong = run.exits(wanted)
        hashes = [dict(map(str.split, Path(f"{run.marker}.{rank}").read_text().splitlines())) for rank in (0, 1)]
        said = [step for step in range(1, STEPS + 1) if f"\nstep {step} skipped: loss nan" in run.output()]
        saved = [checkpoint.step_of(path) for path in reversed(checkpoint.step_files(run.folder))]
        good = [step for step in range(1, STEPS + 1) if step not in bad and (not wanted or step < bad[0])]
        error = f"3 steps in a row, up to step 11; the last good checkpoint is {run.folder}/step_000008.pt"
        finite = all(tensor.isfinite().all() for path in run.folder.glob("*.pt")
                     for tensor in checkpoint.load(path)["model"].values())
        result.check(f"steps {bad}", wrong, "the ranks differ" * (hashes[0] != hashes[1]),
                     f"said of {said}" * (said != bad), f"saved {saved}" * (saved != good),
                     "no example ids" * (run.output().count("; train examples [") != len(bad)),
                     "the optimizer moved" * any(hashes[0][str(step)] != hashes[0][str(step - 1)] for step in bad),
                     "no checkpoint is named" * (wanted != 0 and error not in run.output()),
                     "not finite in a checkpoint" * (not finite), run.orphans())


@measurement("the disk is full")
def disk_full(result: Result, here: Lab, cases: int) -> None:
    """A file system (tmpfs, where that can be mounted) of a size between nothing and all that the run needs, its log
    on it too in half of the cases; else a limit on the size of any file."""
    mounted = 0
    for case in range(cases):
        choose, folder = random.Random(case), here.new_folder()
        # Four files of the run: two step files, the one being written, best_model.pt (a third of one).
        size = int(STEP_BYTES * choose.uniform(0.02, 3.2))
        with small_disk(folder, size) as own:
            mounted += own
            logs = folder / "tb" if choose.random() < 0.5 else here.folder / "logs"
            result.check(f"case {case}, {size:,} bytes", *_complaints(here, folder, 0 if own else size // 4, logs))
    result.notes = f"{mounted} of {cases} on a file system of their own"


def _complaints(here: Lab, folder: Path, limit: int, logs: Path) -> list[str]:
    flags = here.flags("--keep_last", 2, "--checkpoint_freq", 1, "--checkpoint_dir", folder, "--tensorboard_dir", logs)
    limited = ["prlimit", f"--fsize={limit}"] if limit else []
    run = run_command(*limited, sys.executable, SRC / "train_instruct.py", *flags, env={"OMP_NUM_THREADS": "1"})
    errors, said = run.stderr.splitlines(), run.stdout.splitlines()
    words = (f"error: {folder}/", "cannot write it: ", "bytes are needed", "are free")
    saved = max((int(line[-9:-3]) for line in said if line.startswith("saved ")), default=0)
    warned = any(line.startswith(f"warning: {folder}: 3 step files") for line in said)
    left = [path.name for path in folder.glob("*.tmp")]
    damaged = [path.name for path in folder.glob("*.pt") if not checkpoint.load(path)]
    return [f"exit {run.code}" * (run.code != 2),
            f"said {errors}" * (len(errors) != 1 or not all(word in errors[0] for word in words)),
            f"left {left}" * bool(left), f"damaged {damaged}" * bool(damaged),
            f"step {newest(folder)} after saving {saved}" * (newest(folder) < saved),
            "no warning" * (not limit and not warned)]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A folder on a file system of this many bytes; False when this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@measurement("a long run")
def soak(result: Result, here: Lab, steps: int) -> None:
    """A tiny model for very many steps: memory, open files and disk after the warm-up and at the end."""
    result.tried = f"{steps:,} steps, a checkpoint every {steps // 100:,}"
    write_pretrained(here.pretrained, small_model(config=GPTConfig(16, 1009, n_layer=1, n_head=1, n_embd=8)))
    run = here.start(1, "--context_length", 16, "--total_batch_size", 32, "--mini_batch_size", 2, "--max_steps", steps,
                     "--checkpoint_freq", steps // 100, "--eval_freq", steps // 10, "--keep_last", 2, "--log_freq",
                     steps // 100)
    samples = []  # (memory in MiB, open files, bytes of checkpoints)
    while run.process.poll() is None:
        time.sleep(max(0.02, steps / 300_000))
        if (sample := _sample(run)) and (saved := run.saved()) and saved[-1] < steps:  # not while it is ending
            samples.append(sample)
    took = time.monotonic() - run.begin
    log = sum(path.stat().st_size for path in run.folder.glob("tb/*/*"))
    warm, late = samples[len(samples) // 5:len(samples) // 2], samples[len(samples) * 3 // 4:]
    memory = [statistics.median(sample[0] for sample in part) for part in (warm, late)]
    files = [min(sample[1] for sample in part) for part in (warm, late)]  # a save has more open for a moment
    bound = sum(times * (run.folder / name).stat().st_size for times, name in ((3, checkpoint.LATEST),
                                                                               (2, checkpoint.BEST)))
    most_files, disk = (max(sample[number] for sample in samples) for number in (1, 2))
    result.check("exit code", run.exits(0))
    result.check("memory", f"{memory[0]:.1f} MiB, later {memory[1]:.1f}" * (memory[1] > memory[0] + 4))
    result.check("open files", f"{files[0]}, later {files[1]}" * (files[1] > files[0]))
    result.check("disk", f"{disk:,} bytes, {bound:,} expected" * (disk > bound))
    result.check("files at the end", "" if len(list(run.folder.glob("*.pt"))) == 4 else "not four")
    result.notes = (f"memory {memory[0]:.1f} MiB, in the last quarter {memory[1]:.1f}; open files {files[0]}, then "
                    f"{files[1]}, in a save at most {most_files}; checkpoints at most {disk:,} bytes; TensorBoard's "
                    f"log {log:,} bytes, {log / steps:.0f} a step; {1000 * took / steps:.2f} ms a step in all")


def _sample(run: Trainer) -> tuple[float, int, int] | None:
    process = Path(f"/proc/{run.process.pid}")
    try:
        memory = int((process / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        seen = {path.stat().st_ino: path.stat().st_size for path in run.folder.glob("*.pt*")}
        return memory, len(list((process / "fd").iterdir())), sum(seen.values())
    except (OSError, IndexError):  # it has ended, or a file was renamed
        return None
