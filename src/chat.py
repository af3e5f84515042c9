"""Chat with a fine-tuned GPT-2 in a terminal, or answer questions from a pipe.

    ./chat.sh [CHECKPOINT] [flags...]
    ./chat.sh --prompt "Name three primary colours."        answers once and exits
    ./chat.sh --jsonl < questions.jsonl > answers.jsonl     answers each line

Every question stands alone, unless the model was trained on conversations of several turns.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported ends without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import sys
from argparse import Namespace
from pathlib import Path

from answering.settings import Settings, add_flags
from cli import Parser, run
from errors import UserError, errors_at

PROJECT = Path(__file__).parent.parent
CHECKPOINT_DIR = Path("checkpoints_instruct")


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Chat with a fine-tuned GPT-2 in a terminal, or answer questions from a pipe, one a line.",
                    usage="./chat.sh [CHECKPOINT | demo] [flags...]")
    parser.add_argument("--checkpoint", type=Path, help="ours, or any pre-trained GPT-2; default: best_model.pt of "
                        "checkpoints_instruct/, or latest.pt")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits: more than twice as fast on a CPU")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="answer this once and exit")
    asked.add_argument("--jsonl", action="store_true", help="stdin has an object with instruction and perhaps input on "
                       "each line; answers are JSON; sixteen lines are read, then answered together "
                       "(with int8 one by one)")
    parser.add_argument("--input", help="the input of --prompt (default: a piped stdin) or of the first question")
    add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    parser.add_argument("--no_history", action="store_true", help="neither read nor keep what is typed")
    return parser.parse_args(argv)


def find_checkpoint(path: Path | None) -> Path:
    """The checkpoint to chat with, in this folder or else the project's. Raises UserError when there is none."""
    names = [path] if path else [CHECKPOINT_DIR / "best_model.pt", CHECKPOINT_DIR / "latest.pt"]
    for candidate in [*names, *(PROJECT / name for name in names)]:
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no such checkpoint; a question goes after --prompt" if path else
                    f"no checkpoint in {CHECKPOINT_DIR}: fine-tune first (./start_instruct_training.sh), or try the "
                    "demo (./start_instruct_training.sh demo, then ./chat.sh demo)")


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("the question is empty")
    path = find_checkpoint(options.checkpoint)
    if options.jsonl and options.input is not None:
        raise UserError("--input does not go with --jsonl, whose objects have inputs of their own")
    import torch

    from answering.opened import open_for_answers
    from answering.questions import text_of
    from answering.terminal import Chat, first_line
    from training.precision import device_named, failures_explained

    for name in ("prompt", "input"):
        if (text := getattr(options, name)) is not None:  # the bytes that were typed: UTF-8, whatever the locale
            setattr(options, name, text_of(os.fsencode(text), f"--{name}: "))
    device = torch.device(device_named(options.device))
    with failures_explained(device):
        model, state = open_for_answers(path, device, options.quantize, options.jsonl)
        chat = Chat(model, str(path), Settings(**{name: getattr(options, name) for name in Settings._fields}),
                    remembers=state["multi_turn"], as_json=options.json or options.jsonl)
        is_conversation = sys.stdin.isatty() and options.prompt is None and not options.jsonl
        chat.say(first_line(path, state, model.transformer.wte.weight.device.type, "; /help" * is_conversation))
        del state
        if is_conversation:
            return chat.converse(options.input or "", not options.no_history)
        with errors_at("standard input"):
            if options.prompt is None:
                return chat.answer_all(options.input or "", options.jsonl)
            if options.input is None:
                piped = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
                options.input = text_of(piped, "standard input: ").rstrip("\r\n")
        return chat.answer_one(options.prompt, options.input)


if __name__ == "__main__":
    run(main)
