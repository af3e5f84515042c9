"""Fine-tune a GPT-2 on prepared instruction data.

    ./start_instruct_training.sh [NPROC] [flags...]        through the launcher, on NPROC GPUs (or CPU processes)
    python src/train_instruct.py [flags...]                one process
"""

from cli import run
from training.ending import block_signals, leave
from training.options import parse_options


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)  # --help and wrong flags answer before PyTorch is imported
    if options.dry_run:
        from training.dry_run import dry_run

        return dry_run(argv)
    block_signals()  # until the run watches them: importing PyTorch takes seconds
    from training.loop import train
    from training.setup import open_run

    with open_run(argv) as opened:
        return train(opened)


if __name__ == "__main__":
    run(main, leave)
