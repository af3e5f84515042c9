"""One training run: set up or resume, step, evaluate, save, stop. train_instruct.py starts it."""

from __future__ import annotations

import time
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import checkpoint
from cli import DivergedError, UserError, printable
from dataloader_instruct import ExampleStream, InstructData, Position
from durable import free_bytes, lock_folder
from generate import generate
from instruct_format import END_OF_TEXT, TEMPLATE, VOCAB_SIZE, tokenizer
from manifest import read_manifest
from model import GPT, GPTConfig
from processes import Processes, Signals, join
from progress import Progress, banner
from resume import follow, restore, state_to_resume
from train_options import checkpoint_dir_of, complete_options
from train_step import StepResult, evaluate, make_optimizer, train_step, wrap

SAMPLE_PROMPTS, SAMPLE_TOKENS = 3, 48
MOST_SKIPPED = 3  # non-finite steps in a row that end the run


@dataclass
class Run:
    """Everything a run has. The fields from step to val_losses are what a checkpoint adds to model and optimizer."""

    options: Namespace
    processes: Processes
    signals: Signals
    folder: Path
    fingerprint: str
    model: GPT
    loss_of: nn.Module
    optimizer: torch.optim.AdamW
    data: dict[str, InstructData]
    stream: ExampleStream
    name: str
    step: int = 0
    position: Position = Position()
    skipped: int = 0  # non-finite steps in a row, up to now
    val_losses: list[list[float]] = field(default_factory=list)  # [step, loss]
    progress: Progress | None = None  # on the main process only
    behind: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    settling: Future[None] | None = None  # the verification of the last saved file
    saved: Path | None = None  # the file that was saved last, or that the run was resumed from

    def state(self) -> dict[str, Any]:
        options = {name: value for name, value in vars(self.options).items()
                   if name not in ("resume", "override", "device")}
        return {"step": self.step, "position": [self.position.epoch, self.position.index], "skipped": self.skipped,
                "val_losses": self.val_losses, "name": self.name, "options": options, "template": TEMPLATE,
                "data_fingerprint": self.fingerprint, "model_config": vars(self.model.config),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    @property
    def evaluation_due(self) -> bool:
        """Whether this step's evaluation is still to come (a signal may have cut it short before a resume)."""
        at_end = self.step == self.options.max_steps
        done = bool(self.val_losses) and self.val_losses[-1][0] == self.step
        return self.step > 0 and not done and (at_end or self.step % self.options.eval_freq == 0)


def train(given: Namespace) -> int:
    """Run or resume as the options say. Returns the exit code; raises UserError and its kin on every process."""
    signals = Signals()
    signals.watch()
    processes = join(given.device or "auto")
    with ExitStack() as held:
        held.callback(processes.close)
        run, error = None, None
        try:
            run = _set_up(given, processes, signals, held)
        except UserError as caught:
            error = caught
        processes.fail_together(error)
        assert run is not None
        processes.fail_together(follow(run))
        run.loss_of = wrap(run.model, processes)
        return _loop(run)


def _set_up(given: Namespace, processes: Processes, signals: Signals, held: ExitStack) -> Run:
    folder = checkpoint_dir_of(given)
    if processes.is_main:
        held.enter_context(lock_folder(folder))
        checkpoint.remove_temporaries(folder)
    path, state = state_to_resume(given, folder, processes.is_main)
    options = complete_options(given, state["options"] if state else None)
    manifest = read_manifest(Path(options.data_dir))
    if state and state["data_fingerprint"] != manifest["fingerprint"]:
        raise UserError(f"{options.data_dir}: not the data this run was started with (fingerprint "
                        f"{manifest['fingerprint'][:12]}, the run's is {state['data_fingerprint'][:12]})")
    if manifest["template"] != TEMPLATE:
        raise UserError(f"{options.data_dir}: prepared with template {manifest['template']!r}, this version knows "
                        f"{TEMPLATE!r}; prepare the data again")
    model, origin = _model(options, state, path)
    _check_sizes(options, model.config)
    data = {split: InstructData(Path(options.data_dir), split, options.context_length, model.config.vocab_size)
            for split in ("train", "val")}
    if any(split.fingerprint != manifest["fingerprint"] for split in data.values()):
        raise UserError(f"{options.data_dir}: prepared anew while it was being opened; start again")
    model.to(processes.device)
    optimizer = make_optimizer(model, options.weight_decay)
    run = Run(options, processes, signals, folder, manifest["fingerprint"], model, nn.Identity(), optimizer, data,
              ExampleStream(data["train"].lengths, options.seed, options.total_batch_size),
              name=time.strftime("%Y%m%d-%H%M%S"))
    if state:
        restore(run, state, path)
    if processes.is_main:
        held.callback(run.behind.shutdown)
        run.progress = Progress(options, Path(options.tensorboard_dir) / run.name, run.step,
                                run.val_losses[-1][1] if run.val_losses else None)
        held.callback(run.progress.close)
        run.say(banner(options, processes, model, data, origin))
        _warn_of_a_full_disk(run)
    return run


def _warn_of_a_full_disk(run: Run) -> None:
    """Say so when the folder has no room for the files that stay and the one being written."""
    weights = checkpoint.size_of(run.model.state_dict())
    needed = (run.options.keep_last + 1) * 3 * weights + weights  # weights and AdamW's two moments; best_model.pt
    files = [*checkpoint.step_files(run.folder), run.folder / checkpoint.BEST]
    room = free_bytes(run.folder) + sum(path.stat().st_size for path in files if path.exists())
    if room < needed:
        run.say(f"warning: {run.folder}: {run.options.keep_last + 1} step files and {checkpoint.BEST} need {needed:,} "
                f"bytes, there is room for {room:,}; free some space, or lower --keep_last")


def _model(options: Namespace, state: dict[str, Any] | None, path: Path) -> tuple[GPT, str]:
    """The model to train, on the CPU and in memory of its own, and where it comes from."""
    if state is None and options.from_scratch:
        n_layer, n_head, n_embd = (int(size) for size in options.from_scratch.split(","))
        try:
            config = GPTConfig(options.context_length or 1024, VOCAB_SIZE, n_layer, n_head, n_embd)
        except ValueError as error:
            raise UserError(f"--from_scratch {options.from_scratch}: {error}") from error
        model = GPT(config)
        model.init_weights(options.seed)
        return model, "random weights"
    if state is None:
        path = Path(options.pretrained_model)
        if not path.exists():
            raise UserError(f"{path}: no pre-trained model; put yours there, or import one with: python "
                            "src/convert_checkpoint.py import gpt2 --output checkpoints/best_model.pt")
        config, weights = checkpoint.load_pretrained(path)
        origin = f"weights of {path}"
    else:
        mapped = checkpoint.model_of(state, path, torch.device("cpu"))
        config, weights, origin = mapped.config, mapped.state_dict(), f"resumed from {path} at step {state['step']}"
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    return checkpoint.build_model(config, copies, torch.device("cpu")), origin


def _check_sizes(options: Namespace, config: GPTConfig) -> None:
    """Settle context_length and refuse batch sizes that cannot work."""
    options.context_length = options.context_length or config.context_length
    if options.context_length > config.context_length:
        raise UserError(f"--context_length {options.context_length} is above the model's {config.context_length}")
    if options.total_batch_size < options.context_length:
        raise UserError(f"--total_batch_size {options.total_batch_size} is below --context_length "
                        f"{options.context_length}: it counts tokens, not examples; the default is 65536")


def _loop(run: Run) -> int:
    stop = run.processes.largest(run.signals.stop)
    if run.evaluation_due and not stop:  # a signal cut it short before this resume
        stop = _evaluate(run)
        if run.step == run.options.max_steps and not stop:
            _save(run)
    while run.step < run.options.max_steps and not stop:
        begin = time.perf_counter()
        result = train_step(run.loss_of, run.optimizer, run.data["train"], run.stream, run.position, run.step,
                            run.options, run.processes)
        run.step, run.position = run.step + 1, result.after
        _check_finite(run, result)
        if run.progress:
            epoch = result.after.epoch + result.after.index / len(run.data["train"])
            run.progress.step(run.step, result, epoch, time.perf_counter() - begin)
        stop = run.processes.largest(run.signals.stop)
        if run.evaluation_due and not stop:
            stop = _evaluate(run)
        at_end = run.step == run.options.max_steps
        save_asked = run.processes.largest(run.signals.save)
        if at_end or stop or save_asked or run.step % run.options.checkpoint_freq == 0:
            _save(run)
    run.processes.fail_together(_settled(run))
    if run.progress:
        reason = f"stopped by signal {stop}" if stop else "finished"
        latest = run.folder / checkpoint.LATEST
        where = f"the run's state is {latest}" if latest.exists() else "there was nothing to save"
        run.say(f"{reason} at step {run.step}; {where}")
    return 128 + stop if stop else 0


def _check_finite(run: Run, result: StepResult) -> None:
    """Report a step that was skipped because loss or gradients were not finite; give up after three in a row."""
    run.skipped = 0 if result.is_finite else run.skipped + 1
    if result.is_finite:
        return
    run.say(f"step {run.step} skipped: loss {result.loss}, gradient norm {result.gradient_norm}; the weights did not "
            f"move; train examples {result.examples}")
    if run.skipped >= MOST_SKIPPED:
        error = _settled(run)
        last = f"the last good checkpoint is {run.saved}" if run.saved else "there is no checkpoint yet"
        run.processes.fail_together(error or DivergedError(
            f"loss or gradients were not finite for {run.skipped} steps in a row, up to step {run.step}; {last}; try a "
            "lower --learning_rate"))


def _evaluate(run: Run) -> int:
    """Evaluate and keep the best weights. Returns the signal that cut it short, or 0."""
    if not run.val_losses:
        _save(run)  # best_model.pt is then never alone: a run that is killed after it can be resumed
    loss = evaluate(run.loss_of, run.data["val"], run.options, run.processes, run.signals)
    if loss is None:
        return run.processes.largest(run.signals.stop)
    is_best = all(loss < before for _, before in run.val_losses)
    run.val_losses.append([run.step, loss])
    error = None
    if run.progress:
        run.progress.evaluation(run.step, loss, _answers(run))
        if is_best:
            state = {key: value for key, value in run.state().items() if key != "optimizer"}
            try:
                checkpoint.save(run.folder / checkpoint.BEST, state)
            except UserError as caught:
                error = caught
    run.processes.fail_together(error)
    return run.processes.largest(run.signals.stop)


def _answers(run: Run) -> str:
    """Greedy answers to the first val prompts, as Markdown for TensorBoard."""
    blocks = []
    for number in range(min(SAMPLE_PROMPTS, len(run.data["val"]))):
        tokens, mask = run.data["val"].example(number)
        prompt = tokens[:len(tokens) - int(mask.sum())].tolist()
        answer: list[int] = []
        with suppress(ValueError):  # a prompt as long as the context has no room for an answer
            for token in generate(run.model, prompt, SAMPLE_TOKENS, stop_token=END_OF_TEXT):
                answer.append(token)
                if run.signals.stop:
                    break
        text = printable(tokenizer().decode(prompt + answer))
        blocks.append("\n".join("    " + line for line in text.splitlines()))
    return "\n\n---\n\n".join(blocks)


def _save(run: Run) -> None:
    """Save the run's state on the main process. A file that turns out to be damaged ends the run only after this."""
    run.signals.save = 0
    error = _settled(run)
    if run.progress:
        run.progress.flush()
        try:
            run.saved = checkpoint.save_step(run.folder, run.state())
            run.say(f"saved {run.saved}")
            if not error:
                run.settling = run.behind.submit(checkpoint.settle, run.saved, run.options.keep_last)
        except UserError as caught:
            error = error or caught
    run.processes.fail_together(error)


def _settled(run: Run) -> UserError | None:
    """Wait until the last saved file is verified, which happens behind the steps that follow it; what was wrong."""
    settling, run.settling = run.settling, None
    try:
        if settling:
            settling.result()
    except UserError as error:
        return error
    return None
