"""Everything before the first step: options, processes, what a run starts from (inputs.py), the state to resume."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dataloader_instruct import ExampleStream, InstructData, Position
from errors import CheckpointError, UserError, errors_at
from instruct_format import TEMPLATE
from training.checks import doubts, facts
from training.ending import Signals, mark_begun
from training.inputs import check_sizes, find_state, model_of, open_data, split_data
from training.log import RunLog
from training.memory import fit
from training.options import ON_RESUME, parse_options, resumed_options, with_steps
from training.precision import waits_for_disk
from training.processes import Processes, comparable, digest, join
from training.progress import Progress, columns, say
from training.saver import Saver
from training.step import HIGHEST_SCALE, Learner
from weights import checkpoint
from weights.durable import lock_folder


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
    best_loss: float = math.inf  # the lowest val loss: of this run, and of what it went back from
    has_best: bool = True  # whether best_model.pt holds the weights of the lowest val loss
    progress: Progress | None = None  # on the main process only
    saver: Saver = field(default_factory=lambda: Saver(is_later=False))

    def best(self) -> list[float] | None:
        """[step, loss] of the lowest val loss since training began: step 0 is what the model was before."""
        found = [entry for entry in self.val_losses if entry[0] and math.isfinite(entry[1])]
        return min(found, key=lambda entry: entry[1], default=None)

    def evaluations_in_vain(self) -> int:
        """How many evaluations there were since the lowest val loss."""
        losses = [loss for _, loss in self.val_losses]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        options = {name: getattr(self.options, name) for name in ON_RESUME}
        is_scaled = self.learner.product_type is torch.float16  # else it is 1, with which no run in fp16 should begin
        return {"step": self.step, "position": [self.position.epoch, self.position.index], "skipped": self.skipped,
                "val_losses": self.val_losses, "name": self.name, "options": options, "template": TEMPLATE,
                "multi_turn": self.manifest.get("multi_turn", False), "data_source": self.manifest["source"],
                "data_fingerprint": self.manifest["fingerprint"], "model_config": vars(self.learner.model.config),
                "loss_scale": self.learner.loss_scale if is_scaled else HIGHEST_SCALE,
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
        with processes.failures_explained("the model does not fit; free its memory, or start from a smaller model"):
            run = _set_up(argv, options, processes, signals, stack)
        with processes.together():  # only now, when all ranks can start, does latest.pt follow the file resumed from
            if processes.is_main and run.saved and run.saved.parent.samefile(run.folder):
                checkpoint.point_latest(run.saved, run.state(), say)
                checkpoint.abandon_others(run.saved, run.step, say)
            if processes.is_main:
                mark_begun()
        _find_best(run)
        half = run.options.mini_batch_size // 2
        with processes.failures_explained(
                f"go on with --resume auto --mini_batch_size {half}; the results stay the same" if half else
                "go on with --resume auto --gradient_checkpointing; the results stay the same"
                if run.options.gradient_checkpointing == "off" else
                "not even one example fits; a new run with a smaller --context_length leaves long ones out"):
            yield run


def _set_up(argv: list[str] | None, options: Namespace, processes: Processes, signals: Signals,
            stack: ExitStack) -> Run:
    folder = Path(options.checkpoint_dir)
    path, state = Path(), None
    # rank 0 alone looks for a checkpoint, in a folder that all hosts have to share
    with processes.together():
        if processes.is_main:
            stack.enter_context(lock_folder(folder, warn=say))
            checkpoint.remove_temporaries(folder)
            path, state = find_state(options, folder)
    processes.check_shared(folder)
    found, step = processes.gather([str(path), state and state["step"]])[0]
    # what may be refused, on one rank alone too
    with processes.together():
        if not processes.is_main:
            path, state = Path(found), checkpoint.load_run(Path(found)) if step is not None else None
        if state:
            options = resumed_options(argv, state["options"], folder, path)
        prepared = open_data(options, state)
        model, origin = model_of(options, state, path)
        check_sizes(options, model.config)
        data = split_data(prepared, options, model.config.vocab_size)
        stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
        options = with_steps(options, stream.steps_in, state, path)
        started_with: dict[str, object] = {}
        if processes.world_size > 1:
            weights = digest([model.state_dict(), state and [state["step"], state["optimizer"]]])
            started_with = {**comparable(options), "the data": prepared.manifest["fingerprint"][:12],
                            "the weights": weights}
    processes.compare(started_with)
    # the run, where it begins or where the checkpoint left it
    options.mini_batch_size, model.transformer.recompute = fit(options, model, processes)
    learner = Learner(model.to(processes.device), options, processes, say)
    run = Run(options, processes, signals, folder, prepared.manifest, data, stream, learner,
              name=datetime.now().strftime("%Y%m%d-%H%M%S-%f"),  # microseconds: runs that start together differ
              saver=Saver(is_later=waits_for_disk(processes.device)))
    stack.callback(run.saver.close)
    with processes.together():
        if state:
            _restore(run, state, path)
        if processes.is_main:
            val_loss = run.val_losses[-1][1] if run.val_losses else None
            evaluated = {int(step) for step, _ in run.val_losses}
            log = RunLog(Path(options.tensorboard_dir) / run.name, run.step, evaluated, say)
            run.progress = Progress(options, processes.device, log, run.step, val_loss)
            stack.callback(run.progress.close)
            run.progress.about(prepared.manifest, data["train"].lengths)
            say(columns(facts(options, processes, model, data, stream, origin)))
            for doubt in doubts(options, processes, model, data, stream).values():
                say(f"warning: {doubt}")
    return run


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
        run.learner.set_loss_scale(state.get("loss_scale", HIGHEST_SCALE))
    run.position = Position(*state["position"])
    run.step, run.skipped, run.name, run.saved = state["step"], state["skipped"], state["name"], path
    run.val_losses = [list(entry) for entry in state["val_losses"]]


def _find_best(run: Run) -> None:
    """Find the lowest val loss, of the run or of best_model.pt, which may come from a branch that was left, and whether
    a kill between a save and best_model.pt has left that to be written: the state of that step has its weights."""
    path, file_loss, is_damaged = run.folder / checkpoint.BEST, math.inf, False
    if run.processes.is_main and path.exists():
        try:
            losses = checkpoint.load(path)["val_losses"]
            file_loss = min((loss for step, loss in losses if step), default=math.inf)
        except UserError:
            is_damaged = True
    file_loss, damaged = run.processes.sum([file_loss, is_damaged] if run.processes.is_main else [0.0, 0.0])
    best_step, best_loss = run.best() or (-1, math.inf)
    run.has_best = best_step != run.step or best_loss >= file_loss
    run.best_loss = math.inf if damaged and run.has_best else min(best_loss, file_loss)


def _check_moments(optimizer: torch.optim.AdamW, may_be_absent: bool) -> None:
    """Raise ValueError unless each parameter has moments of its shape: fused AdamW does not look, and would read and
    write beyond them."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = optimizer.state.get(parameter, {})
        shapes = [getattr(moments.get(name), "shape", None) for name in ("step", "exp_avg", "exp_avg_sq")]
        if (moments or not may_be_absent) and shapes != [torch.Size(), parameter.shape, parameter.shape]:
            raise ValueError("the optimizer's moments do not fit the parameters")
