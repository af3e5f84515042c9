"""What a run starts from, and what is refused of it: data, the model, sizes that fit, a checkpoint to go on from."""

import math
import os
import shlex
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from data.shards import SPLITS, Prepared, open_prepared
from dataloader_instruct import InstructData, Position
from errors import CheckpointError, UserError, errors_at, python
from instruct_format import TOKENIZER, VOCAB_SIZE
from model import GPT, GPTConfig
from training.processes import less_memory
from training.progress import say
from training.run import Run
from training.step import HIGHEST_SCALE
from weights import checkpoint
from weights.pretrained import check_vocabulary, open_any, without_rows


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
    goes_on = options.resume == "auto" or os.path.exists(os.environ.get("INSTRUCT_BEGUN", ""))  # see mark_begun
    if options.resume == "latest" or (is_here and goes_on):
        return checkpoint.newest_valid(folder, say)
    path, state = Path(options.resume or ""), None
    if options.resume not in (None, "auto"):
        if not path.exists():
            raise UserError(f"{path}: no such file to resume from; name a checkpoint of a run, latest, or auto")
        if path.is_dir():
            raise UserError(f"{path}: a folder; to go on from its newest checkpoint: --resume latest --checkpoint_dir "
                            + shlex.quote(str(path)))
        path = path.resolve() if path.is_symlink() else path
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
                            f"{python()} src/convert_checkpoint.py import gpt2 --output checkpoints/best_model.pt")
        weights = open_any(path, options.n_head)
        model = checkpoint.model_of(weights, path)
        origin = f"weights of {path}{without_rows(weights['left_out'])}"
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


def restore(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put the run where the checkpoint left it."""
    optimizer = run.learner.optimizer
    with errors_at(f"{path}: not a complete state of a run", LookupError, TypeError, ValueError, AttributeError,
                   RuntimeError, raised=CheckpointError), run.processes.failures_explained(less_memory(run.options)):
        groups = optimizer.state_dict()["param_groups"]  # ours: a checkpoint adds the moments alone
        if [group["params"] for group in state["optimizer"]["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("its parameters are grouped otherwise")
        moments = deepcopy(state["optimizer"]["state"])  # the file's memory is for reading
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        _check_moments(optimizer, may_be_absent=state["step"] == state["skipped"])
        if state["position"][1] > len(run.data["train"]):
            raise ValueError(f"position {state['position'][1]} of {len(run.data['train'])} examples")
        run.learner.set_loss_scale(state.get("loss_scale", HIGHEST_SCALE))
    run.position = Position(*state["position"])
    run.step, run.skipped, run.saved = state["step"], state["skipped"], path
    origin = Path(str(state["options"].get("checkpoint_dir")))
    is_copy = os.path.exists(origin) and not origin.samefile(path.parent)
    if run.folder.exists() and path.parent.samefile(run.folder) and not is_copy:  # else the other run keeps its log
        run.name = state["name"]
    run.val_losses = [list(entry) for entry in state["val_losses"]]


def find_best(run: Run) -> None:
    """Find the lowest val loss, of the run or of best_model.pt, which may come from a branch that was left, and whether
    a kill between a save and best_model.pt has left that to be written: the state of that step has its weights."""
    path, file_loss, is_damaged = run.folder / checkpoint.BEST, math.inf, False
    if run.processes.is_main and path.exists():
        try:
            losses = checkpoint.load(path)["val_losses"]
            file_loss = min((loss for step, loss in losses if step), default=math.inf)
        except UserError:
            is_damaged = True
    file_loss, is_damaged = run.processes.gather([file_loss, is_damaged])[0]
    best_step, best_loss = run.best() or (-1, math.inf)
    run.has_best = best_step != run.step or best_loss >= file_loss
    run.best_loss = math.inf if is_damaged and run.has_best else min(best_loss, file_loss)


def _check_moments(optimizer: torch.optim.AdamW, may_be_absent: bool) -> None:
    """Raise ValueError unless each parameter has moments of its shape: fused AdamW does not look, and would read and
    write beyond them."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = optimizer.state.get(parameter, {})
        forms = [(moments[name].shape, moments[name].stride()) for name in ("step", "exp_avg", "exp_avg_sq") if moments]
        if forms != [(torch.Size(), ()), *[(parameter.shape, parameter.stride())] * 2] and (forms or not may_be_absent):
            raise ValueError("the optimizer's moments do not fit the parameters")
