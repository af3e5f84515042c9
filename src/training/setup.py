"""Everything before the first step: options, processes, what a run starts from (inputs.py), the state to resume."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from dataloader_instruct import ExampleStream
from training.checks import doubts, facts
from training.ending import Signals, mark_begun
from training.inputs import check_sizes, find_best, find_state, model_of, open_data, restore, split_data
from training.log import RunLog
from training.memory import fit
from training.options import parse_options, resumed_options, with_steps
from training.precision import name_of, waits_for_disk
from training.processes import Processes, comparable, digest, join, less_memory
from training.progress import Progress, columns, say
from training.run import Run
from training.step import Learner
from training.threads import Saver
from weights import checkpoint
from weights.durable import lock_folder


@contextmanager
def open_run(argv: list[str] | None) -> Iterator[Run]:
    """The run that the command line asks for, ready for its next step. Raises UserError and its kin on every process,
    whichever of them it was that failed."""
    signals = Signals()
    signals.watch()
    options = parse_options(argv)
    processes = join(options.device)
    with ExitStack() as stack:
        # not after an error: leaving the group waits for the ranks that do not know of it
        stack.push(lambda error, *_: processes.close() if error is None else None)
        with processes.failures_explained("the model does not fit; free its memory, or start from a smaller model"):
            run = _set_up(argv, options, processes, signals, stack)
        with processes.together():  # only now, when all ranks can start, is the file resumed from also latest.pt
            if processes.is_main and run.saved and run.saved.parent.samefile(run.folder):
                checkpoint.point_latest(run.saved, say)
                checkpoint.abandon_others(run.saved, run.step, say)
            if processes.is_main:
                mark_begun()
        find_best(run)
        with processes.failures_explained(less_memory(run.options, "go on with --resume auto ")):
            yield run


def _set_up(argv: list[str] | None, options: Namespace, processes: Processes, signals: Signals,
            stack: ExitStack) -> Run:
    folder, path, state = Path(options.checkpoint_dir), Path(), None
    # rank 0 alone looks for a checkpoint, in a folder that all hosts have to share
    with processes.together():
        if processes.is_main:
            is_path = options.resume not in (None, "auto", "latest")
            if not folder.exists() or is_path and not Path(options.resume).exists():  # which makes no folder, no lock
                find_state(options, folder)
            stack.enter_context(lock_folder(folder, warn=say))
            checkpoint.remove_temporaries(folder)
            path, state = find_state(options, folder)
    processes.check_shared(folder)
    found = processes.gather(state and str(path))[0]
    # what may be refused, on one rank alone too
    with processes.together():
        if found and not processes.is_main:
            path, state = Path(found), checkpoint.load_run(Path(found))
        if state:
            options = resumed_options(argv, state["options"], folder, path)
        prepared = open_data(options, state)
        model, origin = model_of(options, state, path)
        check_sizes(options, model.config)
        data = split_data(prepared, options, model.config.vocab_size)
        stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
        options = with_steps(options, stream.steps_in, state, path)
    if processes.world_size > 1:
        weights = digest([model.state_dict(), state and [state["step"], state["optimizer"]]])
        processes.compare({**comparable(options), "the data": prepared.manifest["fingerprint"][:12],
                           "the weights": weights})
    # the run, where it begins or where the checkpoint left it
    options, model.transformer.recompute = fit(options, model, processes)
    devices = processes.gather(name_of(processes.device))
    learner = Learner(model.to(processes.device), options, processes, say)
    run = Run(options, processes, signals, folder, prepared.manifest, data, stream, learner,
              name=datetime.now().strftime("%Y%m%d-%H%M%S-%f"),  # microseconds: runs that start together differ
              saver=Saver(waits_for_disk(processes.device), say))
    stack.callback(run.saver.close)
    with processes.together():
        if state:
            restore(run, state, path)
        if processes.is_main:
            val_loss = run.val_losses[-1][1] if run.val_losses else None
            evaluated = {int(step) for step, _ in run.val_losses}
            log = RunLog(Path(options.tensorboard_dir) / run.name, run.step, evaluated, say)
            run.progress = Progress(options, processes.device, log, run.step, val_loss)
            stack.callback(run.progress.close)
            run.progress.about(prepared.manifest, data["train"].lengths)
            say(columns(facts(options, processes, model, data, stream, origin)))
            for doubt in doubts(options, model, data, stream, devices).values():
                say(f"warning: {doubt}")
    return run
