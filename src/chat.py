"""Chat with a fine-tuned GPT-2 in a terminal.

    ./chat.sh [CHECKPOINT] [flags...]
    ./chat.sh --prompt "Name three primary colours."        answers once and exits

Every question stands alone: the model was trained on single questions, so nothing is remembered between them.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from answering.settings import Settings, add_flags
from cli import Parser, printable_line, run
from errors import CheckpointError, UserError

if TYPE_CHECKING:
    from model import GPT

CHECKPOINT_DIR = Path("checkpoints_instruct")


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Chat with a fine-tuned GPT-2 in a terminal.")
    parser.add_argument("--checkpoint", type=Path, help="default: best_model.pt of checkpoints_instruct/, or latest.pt")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits: more than twice as fast on a CPU")
    parser.add_argument("--prompt", help="answer this once and exit")
    parser.add_argument("--input", default="", help="the input that goes with --prompt, or with the first question")
    add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    return parser.parse_args(argv)


def find_checkpoint(path: Path | None) -> Path:
    """The checkpoint to chat with. Raises UserError when there is none."""
    for candidate in [path] if path else [CHECKPOINT_DIR / "best_model.pt", CHECKPOINT_DIR / "latest.pt"]:
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no such checkpoint" if path else
                    f"no checkpoint in {CHECKPOINT_DIR}: fine-tune first (./start_instruct_training.sh), or try the "
                    "demo (./start_instruct_training.sh demo, then ./chat.sh demo)")


def open_model(path: Path, device_name: str, quantize: str | None) -> "GPT":
    """The model of a checkpoint, ready to answer; says on stderr which one it is. Raises CheckpointError when the
    checkpoint is damaged or was not fine-tuned with this template, UserError for a device that cannot be used."""
    import torch

    from answering.decode_weights import for_decoding
    from instruct_format import TEMPLATE
    from training.precision import device_named
    from weights.checkpoint import load, model_of

    device = torch.device(device_named(device_name))
    state = load(path)
    if state["template"] != TEMPLATE:
        raise CheckpointError(f"{path}: fine-tuned with template {state['template']!r}, chat knows {TEMPLATE!r}"
                              if state["template"] else f"{path}: a pre-trained model; fine-tune it first")
    model = model_of(state, path, device)
    if quantize and device.type != "cpu":
        raise UserError(f"--quantize int8 is for CPUs, not for {device.type}; leave it out, or add --device cpu")
    if device.type == "cpu":
        for_decoding(model, int8=quantize is not None)
    losses = [loss for step, loss in state["val_losses"] if step == state["step"]]
    loss = f", val loss {losses[0]:.4f}" if losses else ""
    print(printable_line(f"{path}: step {state['step']}{loss}, on {device.type}; /help lists the commands"),
          file=sys.stderr)
    return model


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    path = find_checkpoint(options.checkpoint)
    from answering.terminal import Chat

    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    chat = Chat(open_model(path, options.device, options.quantize), settings, options.json)
    if options.prompt is None:
        chat.converse(options.input)
        return 0
    return 130 if chat.answer(options.prompt, options.input).stopped == "interrupt" else 0


if __name__ == "__main__":
    run(main)
