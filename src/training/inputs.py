"""What a run starts from, and what is refused of it: data, a checkpoint to go on from, the model, sizes that fit."""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from data.shards import SPLITS, Prepared, open_prepared
from dataloader_instruct import InstructData
from errors import UserError, errors_at
from instruct_format import TOKENIZER, VOCAB_SIZE
from model import GPT, GPTConfig
from training.ending import is_restart
from training.progress import say
from weights import checkpoint
from weights.pretrained import check_vocabulary, open_any


def open_data(options: Namespace, state: dict[str, Any] | None) -> Prepared:
    """The prepared data, which for a resumed run have to be the ones that it was started with."""
    prepared = open_prepared(Path(options.data_dir))
    if state and state["data_fingerprint"] != prepared.manifest["fingerprint"]:
        raise UserError(f"{options.data_dir}: not the data this run was started with (fingerprint "
                        f"{prepared.manifest['fingerprint'][:12]}, the run's is {state['data_fingerprint'][:12]}); "
                        "name those with --data_dir, or begin a new run with these: --pretrained_model "
                        f"{Path(options.checkpoint_dir) / checkpoint.BEST} --checkpoint_dir NEW")
    return prepared


def split_data(prepared: Prepared, options: Namespace, vocab_size: int) -> dict[str, InstructData]:
    """Both splits. The val loss is that of responses whatever is trained on, so that runs can be compared."""
    if prepared.manifest["tokenizer"] == TOKENIZER:
        check_vocabulary(vocab_size, Path(options.pretrained_model))
    return {split: InstructData(prepared, split, options.context_length,
                                options.loss_on if split == "train" else "response") for split in SPLITS}


def find_state(options: Namespace, folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint to go on from, or None for a new run, which must not overwrite an old one."""
    is_here = (folder / checkpoint.LATEST).exists() or bool(checkpoint.step_files(folder))
    if options.resume == "latest" or (is_here and (options.resume == "auto" or is_restart())):
        return checkpoint.newest_valid(folder, say)
    path, state = Path(options.resume or ""), None
    if options.resume not in (None, "auto"):
        if not path.exists():
            raise UserError(f"{path}: no such file to resume from; name a checkpoint of a run, latest, or auto")
        if path.is_dir():
            raise UserError(f"{path}: a folder; to go on from its newest checkpoint: --resume latest --checkpoint_dir "
                            + shlex.quote(str(path)))
        state = checkpoint.load_run(path)
    if state is None or not (folder.exists() and path.parent.samefile(folder)):
        checkpoint.require_no_run(folder)
    return path, state


def model_of(options: Namespace, state: dict[str, Any] | None, path: Path) -> tuple[GPT, str]:
    """The model to train, on the CPU, and where it comes from."""
    if state is None and options.from_scratch:
        n_layer, n_head, n_embd = (int(size) for size in options.from_scratch.split(","))
        if 12 * n_layer * n_embd**2 > 10**11:
            raise UserError(f"--from_scratch {options.from_scratch}: more than a hundred billion parameters")
        with errors_at(f"--from_scratch {options.from_scratch}", ValueError):
            config = GPTConfig(options.context_length or 1024, VOCAB_SIZE, n_layer, n_head, n_embd)
        with torch.device("meta"):  # PyTorch's own initial values would only be replaced
            model = GPT(config)
        model.to_empty(device="cpu").init_weights(options.seed)
        return model, "random weights"
    if state:
        model, origin = checkpoint.model_of(state, path), f"resumed from {path} at step {state['step']}"
    else:
        path = Path(options.pretrained_model)
        if not path.exists():
            raise UserError(f"{path}: no pre-trained model; put yours there, or import one to the default place with: "
                            "python src/convert_checkpoint.py import gpt2 --output checkpoints/best_model.pt")
        model, origin = checkpoint.model_of(open_any(path, options.n_head), path), f"weights of {path}"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the file's memory is for reading
    return model, origin


def check_sizes(options: Namespace, config: GPTConfig) -> None:
    """Complete context_length; refuse batch sizes and learning rates that cannot work."""
    if options.min_lr > options.learning_rate:
        raise UserError(f"--min_lr {options.min_lr} is above --learning_rate {options.learning_rate}")
    options.context_length = options.context_length or config.context_length
    if options.context_length > config.context_length:
        raise UserError(f"--context_length {options.context_length} is above the model's {config.context_length}")
    if options.total_batch_size < options.context_length:
        raise UserError(f"--total_batch_size {options.total_batch_size} is below --context_length "
                        f"{options.context_length}: it counts tokens, not examples; the default is 65536")
