"""What can be said about a run before its first step, and what is doubtful about it. It costs nothing, so it is looked
at whenever a run starts; dry_run.py shows it as a table."""

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from dataloader_instruct import ExampleStream, InstructData
from instruct_format import VOCAB_SIZE
from model import GPT
from training.precision import product_type, type_name
from training.processes import Processes
from weights import checkpoint
from weights.durable import free_bytes

MOST_EPOCHS, USUAL_EPOCHS = 10, 3  # beyond the first a run is told so; the second is what is usual
SHORT_EPOCH = 10  # steps


def facts(options: Namespace, processes: Processes, model: GPT, data: Mapping[str, InstructData],
          stream: ExampleStream, origin: str) -> dict[str, str]:
    """What the run is, by name. origin says where the weights come from."""
    tokens, most_tokens = int(data["train"].lengths.sum()), options.mini_batch_size * options.context_length
    longer = ", ".join(f"{split.left_out:,} {name}" for name, split in data.items() if split.left_out)
    precision = type_name(product_type(options.precision, processes.device))
    gpu = f" ({torch.cuda.get_device_name(processes.device)})" if processes.device.type == "cuda" else ""
    of_all = ", all examples" if _is_all(stream) else ""
    return {
        "model": f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {model.config.n_layer} "
                 f"layers of {model.config.n_head} heads, width {model.config.n_embd}, context_length "
                 f"{options.context_length}, {origin}",
        "device": f"{processes.device.type}{gpu}, {processes.world_size} process" + "es" * (processes.world_size > 1)
                  + f", products in {precision}",
        "data": f"{len(data['train']):,} train and {len(data['val']):,} val examples, {tokens:,} train tokens"
                + f"; left out, longer than context_length: {longer}" * bool(longer),
        "step": f"{min(options.total_batch_size, tokens):,} tokens{of_all}, micro-batches of at most {most_tokens:,}",
        "epoch": f"about {stream.steps_per_epoch:,.1f} steps",
        "run": f"{options.max_steps:,} steps = {options.max_steps / stream.steps_per_epoch:,.2f} epochs",
        "disk": _disk(options, model)[0],
    }


def doubts(options: Namespace, processes: Processes, model: GPT, data: Mapping[str, InstructData],
           stream: ExampleStream) -> dict[str, str]:
    """What is doubtful about the run, each with what to do, under the name of its fact."""
    tokens, found = int(data["train"].lengths.sum()), {}
    left_out = data["train"].left_out / (len(data["train"]) + data["train"].left_out)
    if left_out > 0.1:
        can_be_longer = options.from_scratch or options.context_length < model.config.context_length
        found["data"] = (f"{100 * left_out:.0f} % of the train examples are longer than context_length and are not "
                         "trained on; " + ("a larger --context_length takes more of them" if can_be_longer else
                                           "the model can take no longer ones"))
    if (examples := len(data["train"]) / stream.steps_per_epoch) < processes.world_size:
        found["step"] = (f"a step has about {examples:.0f} examples for {processes.world_size} processes, so some have "
                         "nothing to do; start fewer")
    if usual := usual_steps(options, stream):
        found["run"] = (f"{options.max_steps / stream.steps_per_epoch:,.0f} times through the same examples is more "
                        f"than a model gains from: {_usual(options, stream, tokens, usual)} is usual")
    elif options.warmup_steps >= options.max_steps:
        found["run"] = (f"the learning rate would still be rising at the end (--warmup_steps {options.warmup_steps}); "
                        f"for so short a run use --warmup_steps {options.max_steps // 10}")
    text, is_room = _disk(options, model)
    if not is_room:
        found["disk"] = f"{options.checkpoint_dir}: {text}; free some space, or lower --keep_last"
    return found


def usual_steps(options: Namespace, stream: ExampleStream) -> int:
    """How many steps the usual number of epochs is, for a run of far more; else 0. Random weights need more."""
    too_many = options.max_steps > MOST_EPOCHS * stream.steps_per_epoch and not options.from_scratch
    return stream.steps_in(USUAL_EPOCHS) if too_many else 0


def _usual(options: Namespace, stream: ExampleStream, tokens: int, steps: int) -> str:
    """The flags of a usual run. One whose epochs are short gets smaller steps: three or four in all teach nothing."""
    flags = f"--epochs {USUAL_EPOCHS}"
    smaller = max(options.context_length, 2 ** int(math.log2(tokens / SHORT_EPOCH)))
    if stream.steps_per_epoch < SHORT_EPOCH and smaller < min(tokens, options.total_batch_size):
        flags += f" --total_batch_size {smaller}"
        steps = ExampleStream(stream.lengths, options.seed, smaller).steps_in(USUAL_EPOCHS)
    if options.warmup_steps >= steps / 2:
        flags += f" --warmup_steps {steps // 10}"
    return f"{flags} ({steps:,} steps)"


def _is_all(stream: ExampleStream) -> bool:
    return int(stream.lengths.sum()) <= stream.most_tokens


def doubt_about_weights(loss: float) -> str:
    """What a first loss says against weights that were given, or nothing."""
    random = math.log(VOCAB_SIZE)
    return "" if loss < random - 1 else (
        f"the loss before training is {loss:.2f}, that of random weights is {random:.2f}: --pretrained_model is not a "
        "trained language model, or its tokenizer is not GPT-2's; name another file")


def _disk(options: Namespace, model: GPT) -> tuple[str, bool]:
    """What the files that stay and the one being written need, and whether there is room for them."""
    folder, keep_last, weights = Path(options.checkpoint_dir), options.keep_last, checkpoint.size_of(model.state_dict())
    needed = (keep_last + 1) * 3 * weights + weights  # weights and AdamW's two moments; best_model.pt
    files = [*checkpoint.step_files(folder), folder / checkpoint.BEST]
    room = free_bytes(existing(folder)) + sum(path.stat().st_size for path in files if path.exists())
    text = f"{keep_last + 1} step files and {checkpoint.BEST} need {needed:,} bytes, there is room for {room:,}"
    return text, room >= needed


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
