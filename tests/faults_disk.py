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

from conftest import SRC
from faults_tools import Lab, Result, Trainer, lab, newest
from helpers import small_model, write_pretrained
from model import GPTConfig
from weights import checkpoint

STEP_BYTES = 1_120_000  # of a step file of the small model


def disk_full(cases: int, shared: Lab | None = None) -> Result:
    """A file system (tmpfs, where that can be mounted) of a size between nothing and all that the run needs, its log
    on it too in half of the cases; else a limit on the size of any file."""
    result, mounted = Result("the disk is full"), 0
    with lab(shared) as here:
        for case in range(cases):
            choose = random.Random(case)
            folder = here.new_folder()
            # Four files of the run: two step files, the one being written, best_model.pt (a third of one).
            size = int(STEP_BYTES * choose.uniform(0.02, 3.2))
            with small_disk(folder, size) as is_mounted:
                mounted += is_mounted
                limit = 0 if is_mounted else size // 4
                logs = [] if choose.random() < 0.5 else ["--tensorboard_dir", str(here.folder / "logs")]
                result.check(f"case {case}, {size:,} bytes", *_complaints(here, folder, limit, logs))
    result.notes = f"{mounted} of {cases} on a file system of their own"
    return result


def _complaints(here: Lab, folder: Path, limit: int, logs: list[str]) -> list[str]:
    flags = here.flags("--keep_last", 2, "--checkpoint_freq", 1, "--checkpoint_dir", folder, "--tensorboard_dir",
                       folder / "tb", *logs)
    run = subprocess.run([sys.executable, str(SRC / "train_instruct.py"), *flags], capture_output=True, text=True,
                         timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
                         preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit
                         else None)
    errors = run.stderr.splitlines()
    words = (f"error: {folder}/", "cannot write it: ", "bytes are needed", "are free")
    saved = max((int(line[-9:-3]) for line in run.stdout.splitlines() if line.startswith("saved ")), default=0)
    warned = sum(line.startswith(f"warning: {folder}: 3 step files") for line in run.stdout.splitlines())
    left = [path.name for path in folder.glob("*.tmp")]
    damaged = [path.name for path in folder.glob("*.pt") if not checkpoint.load(path)]
    return [f"exit {run.returncode}" * (run.returncode != 2), f"told {errors}" * (len(errors) != 1),
            f"told {errors[:1]}" * (not all(word in errors[0] for word in words) if errors else False),
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


def soak(steps: int) -> Result:
    """A tiny model for very many steps: memory, open files and disk after the warm-up and at the end."""
    result = Result(f"{steps:,} steps, a checkpoint every {steps // 100:,}")
    with lab() as here:
        tiny = small_model(config=GPTConfig(context_length=16, vocab_size=1009, n_layer=1, n_head=1, n_embd=8))
        write_pretrained(here.pretrained, tiny)
        flags = here.flags("--context_length", 16, "--total_batch_size", 32, "--mini_batch_size", 2, "--max_steps",
                           steps, "--checkpoint_freq", steps // 100, "--eval_freq", steps // 10, "--keep_last", 2,
                           "--log_freq", steps // 100)
        run = Trainer(here, here.new_folder(), 1, flags)
        samples = []  # (memory in MiB, open files, bytes of checkpoints)
        while run.process.poll() is None:
            time.sleep(max(0.02, steps / 300_000))
            if (sample := _sample(run)) and (saved := run.saved()) and saved[-1] < steps:  # not while it is ending
                samples.append(sample)
        log = sum(path.stat().st_size for path in run.folder.glob("tb/*/*"))
        warm, late = samples[len(samples) // 5:len(samples) // 2], samples[len(samples) * 3 // 4:]
        memory = [statistics.median(sample[0] for sample in part) for part in (warm, late)]
        files = [min(sample[1] for sample in part) for part in (warm, late)]  # a save has more open for a moment
        step_bytes = (run.folder / checkpoint.LATEST).stat().st_size
        bound = 3 * step_bytes + 2 * (run.folder / checkpoint.BEST).stat().st_size
        most_files, disk = (max(sample[number] for sample in samples) for number in (1, 2))
        result.check("exit code", f"exit {run.wait()}: {run.output()[-300:]}" * (run.wait() != 0))
        result.check("memory", f"{memory[0]:.1f} MiB, later {memory[1]:.1f}" * (memory[1] > memory[0] + 4))
        result.check("open files", f"{files[0]}, later {files[1]}" * (files[1] > files[0]))
        result.check("disk", f"{disk:,} bytes, {bound:,} expected" * (disk > bound))
        result.check("files at the end", "" if len(list(run.folder.glob("*.pt"))) == 4 else "not four")
        took = time.monotonic() - run.begin
    result.notes = (f"memory {memory[0]:.1f} MiB, in the last quarter {memory[1]:.1f}; open files {files[0]}, then "
                    f"{files[1]}, in a save at most {most_files}; checkpoints at most {disk:,} bytes; "
                    f"TensorBoard's log {log:,} bytes, {log / steps:.0f} a step; {1000 * took / steps:.2f} ms a step, "
                    "start and saves included")
    return result


def _sample(run: Trainer) -> tuple[float, int, int] | None:
    process = Path(f"/proc/{run.process.pid}")
    try:
        memory = int((process / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        seen = {path.stat().st_ino: path.stat().st_size for path in run.folder.glob("*.pt*")}
        return memory, len(list((process / "fd").iterdir())), sum(seen.values())
    except (OSError, IndexError):  # it has ended, or a file was renamed
        return None
