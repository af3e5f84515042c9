"""A disk that fills up during a run, and a run so long that any leak would show."""

import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import SRC, run_command
from faults_tools import Lab, Result, Trainer, measurement, newest
from model import GPTConfig
from models import small_model, write_pretrained
from weights import checkpoint

STEP_BYTES = 1_120_000  # of a step file of the small model


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
