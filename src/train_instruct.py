"""Fine-tune a GPT-2 on prepared instruction data.

    ./start_instruct_training.sh [NPROC] [flags...]        through torchrun, on NPROC GPUs (or CPU processes)
    python src/train_instruct.py [flags...]                one process

This file only reads the options, so that --help and wrong flags answer before PyTorch is imported.
"""

from __future__ import annotations

from cli import hold_signals, run
from train_options import parse_options


def main(argv: list[str] | None = None) -> int:
    given = parse_options(argv)
    hold_signals()  # until the trainer watches them: importing PyTorch takes seconds
    from training_run import train

    return train(given)


if __name__ == "__main__":
    run(main)
