"""Everything before the first step, and every refusal: options, data, weights, the state that is resumed."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.shards import SPLITS, open_prepared
from dataloader_instruct import ExampleStream, InstructData, Position
from errors import CheckpointError, DiedError, UserError, errors_at
from instruct_format import TEMPLATE, VOCAB_SIZE
from model import GPT, GPTConfig
from training.ending import Signals, decide, is_restart
from training.options import ON_RESUME, parse_options, resumed_options
from training.processes import Processes, join
from training.progress import Progress, banner, say
from training.step import Learner
from weights import checkpoint
from weights.durable import free_bytes, lock_folder
from weights.pretrained import load_pretrained


@dataclass
class Run:
    """Everything a run has. The fields from step to val_losses are what a checkpoint adds to model and optimizer."""

    options: Namespace
    processes: Processes
    signals: Signals
    folder: Path
    manifest: dict[str, Any]  # of the prepared data
    data: dict[str, InstructData]
    stream: ExampleStream
    learner: Learner
    name: str
    step: int = 0
    position: Position = Position()
    skipped: int = 0  # non-finite steps in a row, up to now
    val_losses: list[list[float]] = field(default_factory=list)  # [step, loss]
    saved: Path | None = None  # the file that was saved last, or that the run was resumed from
    is_saved: bool = True  # whether that file holds the run as it is now; a run of no steps has nothing to save
    has_best: bool = True  # whether best_model.pt holds the weights of the lowest val loss
    progress: Progress | None = None  # on the main process only

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        options = {name: getattr(self.options, name) for name in ON_RESUME}
        return {"step": self.step, "position": [self.position.epoch, self.position.index], "skipped": self.skipped,
                "val_losses": self.val_losses, "name": self.name, "options": options, "template": TEMPLATE,
                "multi_turn": self.manifest.get("multi_turn", False), "data_source": self.manifest["source"],
                "data_fingerprint": self.manifest["fingerprint"], "model_config": vars(self.learner.model.config),
                "model": self.learner.model.state_dict(), "optimizer": self.learner.optimizer.state_dict()}


@contextmanager
def open_run(argv: list[str] | None) -> Iterator[Run]:
    """The run that the command line asks for, ready for its next step. Raises UserError and its kin on every process,
    whichever of them it was that failed."""
    signals = Signals()
    signals.watch()
    options = parse_options(argv)
    processes = join(options.device)
    with ExitStack() as stack:
        stack.callback(processes.close)
        run = _set_up(argv, options, processes, signals, stack)
        with processes.together():  # only now, when all ranks can start, does latest.pt follow the file resumed from
            if processes.is_main and run.saved and run.saved.parent.samefile(run.folder):
                checkpoint.point_latest(run.saved, run.state())
        run.has_best = not any(processes.largest(processes.is_main and _lacks_best(run)))
        yield run


def _set_up(argv: list[str] | None, options: Namespace, processes: Processes, signals: Signals,
            stack: ExitStack) -> Run:
    folder = Path(options.checkpoint_dir)
    # what may be refused, on one rank alone too
    with processes.together():
        if processes.is_main:
            stack.enter_context(lock_folder(folder))
            checkpoint.remove_temporaries(folder)
        path, state = _find_state(options, folder)
        if state:
            options = resumed_options(argv, state["options"], folder, path)
        prepared = open_prepared(Path(options.data_dir))
        if state and state["data_fingerprint"] != prepared.manifest["fingerprint"]:
            raise UserError(f"{options.data_dir}: not the data this run was started with (fingerprint "
                            f"{prepared.manifest['fingerprint'][:12]}, the run's is {state['data_fingerprint'][:12]})")
        model, origin = _model(options, state, path)
        _check_sizes(options, model.config)
        data = {split: InstructData(prepared, split, options.context_length, model.config.vocab_size)
                for split in SPLITS}
    # the run, where it begins or where the checkpoint left it
    stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
    learner = Learner.of(model.to(processes.device), options, processes)
    run = Run(options, processes, signals, folder, prepared.manifest, data, stream, learner,
              name=time.strftime("%Y%m%d-%H%M%S"))
    with processes.together():
        if state:
            _restore(run, state, path)
        if processes.is_main:
            val_loss = run.val_losses[-1][1] if run.val_losses else None
            run.progress = Progress(options, Path(options.tensorboard_dir) / run.name, run.step, val_loss)
            stack.callback(run.progress.close)
            say(banner(options, processes, model, data, origin))
            _warn_of_a_full_disk(run)
    return run


def _find_state(options: Namespace, folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint to go on from, or None for a new run, which must not overwrite an old one."""
    latest, best = folder / checkpoint.LATEST, folder / checkpoint.BEST
    if is_restart() and not latest.exists():
        decide(DiedError.exit_code)
        raise DiedError("a process of the run died before the first checkpoint was saved; starting again by itself "
                        "would only repeat that, so see above why, and run the command again")
    if options.resume == "latest" or is_restart():
        return checkpoint.newest_valid(folder, say)
    if options.resume:
        return Path(options.resume), checkpoint.load_run(Path(options.resume))
    if latest.exists() or best.exists():
        raise UserError(f"{latest if latest.exists() else best}: a run is here already; --resume latest goes on with "
                        "it, another --checkpoint_dir starts a new one")
    return Path(), None


def _model(options: Namespace, state: dict[str, Any] | None, path: Path) -> tuple[GPT, str]:
    """The model to train, on the CPU, and where it comes from."""
    cpu = torch.device("cpu")
    if state is None and options.from_scratch:
        n_layer, n_head, n_embd = (int(size) for size in options.from_scratch.split(","))
        with errors_at(f"--from_scratch {options.from_scratch}", ValueError):
            config = GPTConfig(options.context_length or 1024, VOCAB_SIZE, n_layer, n_head, n_embd)
        with torch.device("meta"):  # PyTorch's own initial values would only be replaced
            model = GPT(config)
        model.to_empty(device=cpu).init_weights(options.seed)
        return model, "random weights"
    if state:
        model, origin = checkpoint.model_of(state, path, cpu), f"resumed from {path} at step {state['step']}"
    else:
        path = Path(options.pretrained_model)
        if not path.exists():
            raise UserError(f"{path}: no pre-trained model; put yours there, or import one with: python "
                            "src/convert_checkpoint.py import gpt2 --output checkpoints/best_model.pt")
        model, origin = checkpoint.build_model(*load_pretrained(path), cpu), f"weights of {path}"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the file's memory is for reading
    return model, origin


def _check_sizes(options: Namespace, config: GPTConfig) -> None:
    """Complete context_length and refuse batch sizes that cannot work."""
    options.context_length = options.context_length or config.context_length
    if options.context_length > config.context_length:
        raise UserError(f"--context_length {options.context_length} is above the model's {config.context_length}")
    if options.total_batch_size < options.context_length:
        raise UserError(f"--total_batch_size {options.total_batch_size} is below --context_length "
                        f"{options.context_length}: it counts tokens, not examples; the default is 65536")


def _restore(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put the run where the checkpoint left it."""
    optimizer = run.learner.optimizer
    with errors_at(f"{path}: not a complete state of a run", LookupError, TypeError, ValueError, AttributeError,
                   RuntimeError, raised=CheckpointError):
        groups = optimizer.state_dict()["param_groups"]  # ours: a checkpoint adds the moments alone
        if [group["params"] for group in state["optimizer"]["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("its parameters are grouped otherwise")
        moments = deepcopy(state["optimizer"]["state"])  # the file's memory is for reading
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        _check_moments(optimizer, may_be_absent=state["step"] == state["skipped"])
        if state["position"][1] > len(run.data["train"]):
            raise ValueError(f"position {state['position'][1]} of {len(run.data['train'])} examples")
    run.position = Position(*state["position"])
    run.step, run.skipped, run.name, run.saved = state["step"], state["skipped"], state["name"], path
    run.val_losses = [list(entry) for entry in state["val_losses"]]


def _lacks_best(run: Run) -> bool:
    """Whether a kill between a save and best_model.pt has left that to be written. The state that was saved at the
    best step has its weights."""
    best_step, best_loss = min(run.val_losses, key=lambda entry: entry[1], default=(-1, 0.0))
    if best_step != run.step:
        return False
    try:
        return all(loss > best_loss for _, loss in checkpoint.load(run.folder / checkpoint.BEST)["val_losses"])
    except UserError:  # it is not there, or damaged
        return True


def _check_moments(optimizer: torch.optim.AdamW, may_be_absent: bool) -> None:
    """Raise ValueError unless each parameter has moments of its shape: fused AdamW does not look, and would read and
    write beyond them."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = optimizer.state.get(parameter, {})
        shapes = [getattr(moments.get(name), "shape", None) for name in ("step", "exp_avg", "exp_avg_sq")]
        if (moments or not may_be_absent) and shapes != [torch.Size(), parameter.shape, parameter.shape]:
            raise ValueError("the optimizer's moments do not fit the parameters")


def _warn_of_a_full_disk(run: Run) -> None:
    """Say so when the folder has no room for the files that stay and the one being written."""
    weights, keep_last = checkpoint.size_of(run.learner.model.state_dict()), run.options.keep_last
    needed = (keep_last + 1) * 3 * weights + weights  # weights and AdamW's two moments; best_model.pt
    files = [*checkpoint.step_files(run.folder), run.folder / checkpoint.BEST]
    room = free_bytes(run.folder) + sum(path.stat().st_size for path in files if path.exists())
    if room < needed:
        say(f"warning: {run.folder}: {keep_last + 1} step files and {checkpoint.BEST} need {needed:,} bytes, there "
                f"is room for {room:,}; free some space, or lower --keep_last")
