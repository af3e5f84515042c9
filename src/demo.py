"""The demo: the built-in dataset, a small GPT-2 from random weights, the ordinary scripts with ordinary flags.

    ./start_instruct_training.sh demo [flags of src/train_instruct.py...]

Everything goes to demo/, which is made anew each time; your own data, checkpoints and logs are not touched.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cli import UserError, run
from train_options import parse_options

SOURCE = Path(__file__).parent
FOLDER = Path("demo")
TRAINING = ("--from_scratch 4,4,128 --context_length 128 --total_batch_size 1024 --max_steps 320 --learning_rate 2e-3 "
            "--min_lr 2e-4 --warmup_steps 30 --weight_decay 0.1 --eval_freq 100 --checkpoint_freq 100 --keep_last 1 "
            "--log_freq 20 --device cpu")
NEXT = """
This model knows 120 facts and nothing else. Chat with it:   ./chat.sh demo
With real data and a real model:                             see README.md, or
  python src/convert_checkpoint.py import gpt2               (or your own file as checkpoints/best_model.pt)
  python src/prepare_instruct_dataset.py
  ./start_instruct_training.sh"""


def call(script: str, *flags: str) -> None:
    """Run one of the scripts as a user would, showing the command. Leaves with its exit code when it fails."""
    print(f"\n$ {shlex.join(['python', f'src/{script}', *flags])}", flush=True)
    code = subprocess.run([sys.executable, str(SOURCE / script), *flags], check=False).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    parse_options([*TRAINING.split(), *sys.argv[1:]])  # a wrong flag is told before anything is removed
    data, checkpoints = FOLDER / "data", FOLDER / "checkpoints"
    try:
        if FOLDER.exists():
            shutil.rmtree(FOLDER)
    except OSError as error:
        raise UserError(f"{FOLDER}: cannot remove the last demo: {error.strerror}") from error
    call("prepare_instruct_dataset.py", "--dataset", "src/demo_dataset.jsonl", "--output_dir", str(data))
    call("train_instruct.py", "--data_dir", str(data), "--checkpoint_dir", str(checkpoints), "--tensorboard_dir",
         str(FOLDER / "runs"), *TRAINING.split(), *sys.argv[1:])
    print("\nQuestions in wordings that it was not trained on:", flush=True)
    call("score_answers.py", "--checkpoint", str(checkpoints / "best_model.pt"), "--data_dir", str(data))
    print(NEXT)
    return 0


if __name__ == "__main__":
    run(main)
