"""Start the trainer under torchrun and leave with its exit code: python src/launch.py NPROC [trainer flags...]

torchrun starts NPROC processes, restarts them up to three times when one dies (they go on from the newest
checkpoint), and passes signals on. What the trainer itself decided, an error of the user's for instance, is final: it
comes back through a small file, so that it is neither retried nor buried under a stack trace. On several machines run
this on each, with torchrun's own flags in TORCHRUN_FLAGS.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from cli import EXIT_CODE_FILE, UserError, run

MAX_RESTARTS = 3


def main() -> int:
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        raise UserError("the first argument is the number of processes, at least 1")
    processes, flags = int(sys.argv[1]), sys.argv[2:]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    machines = shlex.split(os.environ.get("TORCHRUN_FLAGS", "")) or ["--standalone"]
    trainer = str(Path(__file__).with_name("train_instruct.py"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[EXIT_CODE_FILE] = str(Path(folder) / "exit_code")
        code = 0
        try:
            torchrun.main([*machines, f"--nproc_per_node={processes}", f"--max_restarts={MAX_RESTARTS}", trainer,
                           *flags])
        except ChildFailedError as error:
            code = max(1, error.get_first_failure()[1].exitcode)
        except SignalException as error:
            code = 128 + error.sigval
        decided = Path(os.environ[EXIT_CODE_FILE])
        return int(decided.read_text()) if decided.exists() else code


if __name__ == "__main__":
    run(main)
