"""What can be said about a run before its first step, and what is doubtful about it. It costs nothing, so it is looked
at whenever a run starts; dry_run.py shows it as a table."""

import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dataloader_instruct import ExampleStream, InstructData
from instruct_format import VOCAB_SIZE
from model import GPT
from training.memory import computer_memory, most_tokens
from training.precision import name_of
from training.processes import Processes
from weights import checkpoint
from weights.durable import free_bytes

MOST_EPOCHS, USUAL_EPOCHS = 10, 3  # more than the first are named as too many; the second is usual
SHORT_EPOCH = 10  # steps


def facts(options: Namespace, processes: Processes, model: GPT, data: Mapping[str, InstructData],
          stream: ExampleStream, origin: str) -> dict[str, str]:
    """What the run is, by name. origin says where the weights come from."""
    tokens = int(data["train"].lengths.sum())
    longer = ", ".join(f"{split.left_out:,} {name}" for name, split in data.items() if split.left_out)
    device = processes.device
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_slower = device.type == "cpu" and options.precision == "fp32" and has_bf16
    return {
        "model": f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {model.config.n_layer} "
                 f"layers of {model.config.n_head} heads, width {model.config.n_embd}, context_length "
                 f"{options.context_length}, {origin}",
        "device": f"{name_of(device)}, {processes.world_size} process" + "es" * (processes.world_size > 1)
                  + f", products in {options.precision}"
                  + "; --precision bf16 may take half the time on this CPU" * is_slower,
        "data": f"{len(data['train']):,} train and {len(data['val']):,} val examples, {tokens:,} train tokens"
                + f"; left out, longer than context_length: {longer}" * bool(longer),
        "step": f"{min(options.total_batch_size, tokens):,} tokens" + ", all examples" * (tokens <= stream.most_tokens)
                + f", micro-batches of at most {most_tokens(options):,}",
        "epoch": f"about {stream.steps_per_epoch:,.1f} steps",
        "run": f"{options.max_steps:,} steps = {options.max_steps / stream.steps_per_epoch:,.2f} epochs",
        "disk": _disk(options, model)[0],
    }


def doubts(options: Namespace, model: GPT, data: Mapping[str, InstructData], stream: ExampleStream,
           devices: Sequence[str]) -> dict[str, str]:
    """What is doubtful about the run, each with what to do, under the name of its fact. devices: those of the ranks."""
    train, found = data["train"], {}
    left_out, epochs = train.left_out / (len(train) + train.left_out), options.max_steps / stream.steps_per_epoch
    if len(set(devices)) > 1:
        found["device"] = f"they differ ({'; '.join(devices)}), and the slowest sets the pace"
    if left_out > 0.1:
        can_be_longer = options.from_scratch or options.context_length < model.config.context_length
        found["data"] = (f"{100 * left_out:.0f} % of the train examples are longer than context_length and are not "
                         "trained on; " + ("a larger --context_length takes more of them" if can_be_longer else
                                           "the model can take no longer ones"))
    if epochs > MOST_EPOCHS and not options.from_scratch:  # random weights need more
        found["run"] = (f"{epochs:,.0f} times through the same examples is more than a model gains from: "
                        f"{_usual_flags(options, stream)} is usual")
    elif options.warmup_steps >= options.max_steps:
        found["run"] = (f"the learning rate would still be rising at the end (--warmup_steps {options.warmup_steps}); "
                        f"for so short a run use --warmup_steps {options.max_steps // 10}")
    copy, there = 3 * checkpoint.size_of(model.state_dict()), computer_memory()
    if devices[0] not in ("cpu", "mps") and copy > 0.8 * there:
        found["saves"] = (f"each copies {copy / 1e9:.1f} GB from the GPU into the computer's memory of "
                          f"{there / 1e9:.1f} GB, and the system may end the run there; take a smaller model")
    text, is_room = _disk(options, model)
    if not is_room:
        found["disk"] = f"{options.checkpoint_dir}: {text}; free some space, or lower --keep_last"
    return found


def _usual_flags(options: Namespace, stream: ExampleStream) -> str:
    """Those of a usual run. Where an epoch is short, with smaller steps: three or four in all teach nothing."""
    flags, tokens = f"--epochs {USUAL_EPOCHS}", int(stream.lengths.sum())
    smaller = max(options.context_length, 1 << max(0, (tokens // SHORT_EPOCH).bit_length() - 1))
    if smaller < min(tokens, options.total_batch_size):
        flags += f" --total_batch_size {smaller}"
        stream = ExampleStream(stream.lengths, options.seed, smaller)
    steps = stream.steps_in(USUAL_EPOCHS)
    return flags + f" --warmup_steps {steps // 10}" * (options.warmup_steps >= steps / 2) + f" ({steps:,} steps)"


def doubt_about_weights(loss: float) -> str:
    """What a first loss says against weights that are no random ones, or nothing."""
    random = math.log(VOCAB_SIZE)
    return "" if loss < random - 1 else (
        f"the first loss is {loss:.2f}, that of random weights is {random:.2f}: these weights are not those of a "
        "trained language model, or its tokenizer is not GPT-2's; begin with others: --pretrained_model")


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
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
