"""Runs of the trainer, one after another, on however many processes there are.

    resume_worker.py DATA PRETRAINED FOLDER STEP...     a whole run into FOLDER/whole, then one from each of its steps
"""

import os
import shutil
import sys
from pathlib import Path

import train_instruct
from cli import run
from helpers import resume_flags
from training.ending import leave


def main(data_dir: str, pretrained: str, folder: str, *steps: str) -> int:
    port, main_process = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    flags = resume_flags(Path(data_dir), Path(pretrained))
    for number, step in enumerate(["whole", *steps]):
        os.environ["MASTER_PORT"] = str(port + number)
        target = Path(folder) / step
        arguments = [*flags, "--checkpoint_dir", str(target), "--tensorboard_dir", str(target)]
        if step != "whole":
            source = Path(folder) / "whole" / f"step_{int(step):06d}.pt"
            arguments = ["--resume", str(source), *arguments[-4:]]
        assert train_instruct.main(arguments) == 0
        if main_process and step != "whole":
            for path in target.glob("step_*.pt"):
                if path.name != "step_000024.pt":
                    path.unlink()
            shutil.rmtree(target / "runs", ignore_errors=True)
    return 0


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]), leave)
