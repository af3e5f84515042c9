"""Start the trainer under torchrun and leave with its exit code: python -m training.launch NPROC [trainer flags...]

torchrun starts NPROC processes and restarts them up to three times when one dies (they go on from the newest
checkpoint). What the trainer itself decided, an error of the user's for instance, is final: it comes back through a
small file, so that it is neither retried nor buried under a stack trace. SIGINT, SIGTERM and SIGUSR1 are passed on to
the trainers, which take the time they need to save. On several machines run this on each, with torchrun's own flags in
TORCHRUN_FLAGS.
"""

import os
import shlex
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Thread

from cli import run
from errors import UserError
from training.ending import EXIT_CODE_FILE, WATCHED_SIGNALS, block_signals
from training.options import parse_options
from weights.durable import lock_folder

MAX_RESTARTS = 3
TRAINER = Path(__file__).parent.parent / "train_instruct.py"


def main() -> int:
    block_signals()
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        raise UserError("the first argument is the number of processes, at least 1")
    processes, flags = int(sys.argv[1]), sys.argv[2:]
    options = parse_options(flags)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # A new store for every start: in the shared one restarted processes find each other's old addresses (torch 2.13).
    # Its port is free when it is chosen; should another program take it first, that start fails and one is left less.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if "TORCHRUN_FLAGS" not in os.environ:  # on several machines, another launcher's trainer may hold it for this run
        with lock_folder(Path(options.checkpoint_dir)):
            pass  # refused before any process is started if a run goes on there
    Thread(target=_pass_on_signals, daemon=True).start()

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    machines = shlex.split(os.environ.get("TORCHRUN_FLAGS", "")) or ["--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        decided = Path(folder) / "exit_code"
        os.environ[EXIT_CODE_FILE] = str(decided)
        code = 0
        try:
            torchrun.main([*machines, f"--nproc_per_node={processes}", f"--max_restarts={MAX_RESTARTS}", str(TRAINER),
                           *flags])
        except ChildFailedError as error:
            code = max(1, error.get_first_failure()[1].exitcode)
        except SignalException as error:
            code = 128 + error.sigval
        return int(decided.read_text()) if decided.exists() else code


def _pass_on_signals() -> None:
    """Give the signals that this process has blocked to the trainers. Without trainers there is nothing to save."""
    while True:
        number = signal.sigwait(WATCHED_SIGNALS)
        trainers = _children()
        for trainer in trainers:
            with suppress(ProcessLookupError):
                os.kill(trainer, number)
        if not trainers and number != signal.SIGUSR1:
            os._exit(128 + number)


def _children() -> list[int]:
    """The processes that this one has started (proc(5): the fourth field of stat is the parent)."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended by now
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                children.append(int(stat.parent.name))
    return children


if __name__ == "__main__":
    run(main)
