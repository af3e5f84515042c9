"""The loop of a run: once in a while evaluate, once in a while save, then a step."""

import time
from collections.abc import Mapping
from math import isfinite
from signal import SIGINT, Signals
from typing import Any

from training.memory import most_tokens
from training.progress import say
from training.run import Run
from training.samples import sample_answers
from training.step import SCALE_STEPS, evaluate, learning_rate, train_step
from training.summary import diverged, summary
from weights.checkpoint import BEST, save, save_step, step_file

MOST_SKIPPED = 3  # non-finite steps in a row that end the run


def train(run: Run) -> int:
    """Go on until max_steps or a signal. Returns the exit code."""
    options, begin, first_step = run.options, time.perf_counter(), run.step
    while True:
        stop, save_asked, failed = run.processes.largest(run.signals.stop, run.signals.save, run.saver.has_failed)
        if failed:
            _wait_for_saves(run)

        # once in a while: evaluate, before the first step too. A resumed run begins with what a signal cut short
        at_end = run.step >= options.max_steps
        is_evaluated = bool(run.val_losses) and run.val_losses[-1][0] == run.step
        if (at_end or run.step % options.eval_freq == 0) and not (is_evaluated or stop):
            stop = _evaluate(run)
        in_vain = run.evaluations_in_vain()
        is_over = at_end or 0 < options.patience <= in_vain

        # once in a while, not amid skipped steps: save; also before a first best_model.pt, which is never alone
        is_due = stop or is_over or (not run.skipped and (save_asked or run.step % options.checkpoint_freq == 0))
        is_alone = run.saved is None or run.saved.parent != run.folder
        is_due = (is_due and not run.is_saved) or (is_alone and not run.has_best)
        if is_due or not run.has_best:
            _save(run, is_due, is_best=not run.has_best)

        if stop or is_over:
            break
        _step(run)

    _wait_for_saves(run)
    reason = "finished" if at_end else (
        f"stopped, as {in_vain} evaluation{'s' * (in_vain > 1)} gained nothing (--patience 0 goes on)")
    if run.progress:
        run.progress.bar.close()  # what is said from now on stands below it
        reason = f"stopped by {'Ctrl-C' if stop == SIGINT else Signals(stop).name}" if stop else reason
        say(summary(run, reason, time.perf_counter() - begin, run.step - first_step))
    return 128 + stop if stop else 0


def _step(run: Run) -> None:
    """One optimizer step. Raises DivergedError after several steps in a row that were not finite."""
    options, train_data, begin = run.options, run.data["train"], time.perf_counter()
    examples, after = run.stream.step(run.position)
    plan = train_data.plan(examples, most_tokens(options), run.processes.world_size)
    result = train_step(run.learner, train_data, plan, learning_rate(run.step, options))
    run.step, run.position, run.is_saved = run.step + 1, after, False
    if run.step % SCALE_STEPS == 0:
        run.learner.set_loss_scale(2 * run.learner.loss_scale)
    run.skipped = 0 if result.is_finite else run.skipped + 1
    if run.skipped:
        say(f"step {run.step} skipped: loss {result.loss}, gradient norm {result.gradient_norm}; the weights did not "
            f"move; train examples {examples[:20]}" + f" and {len(examples) - 20} more" * (len(examples) > 20))
    if run.skipped >= MOST_SKIPPED:
        _wait_for_saves(run)
        raise diverged(run, f"loss or gradients were not finite for {run.skipped} steps in a row")
    if run.progress:
        epoch = after.epoch + after.index / len(train_data)
        run.progress.step(run.step, result, plan, epoch, time.perf_counter() - begin)


def _evaluate(run: Run) -> int:
    """Evaluate on the val split, or on its first eval_examples. Returns the signal that cut it short, or 0."""
    def stop() -> int:
        return run.processes.largest(run.signals.stop)[0]

    options, val_data = run.options, run.data["val"]
    examples = range(min(options.eval_examples or len(val_data), len(val_data)))
    plan = val_data.plan(examples, most_tokens(options), run.processes.world_size)
    if not run.step:
        say("evaluating the model as it is before training")
    loss = evaluate(run.learner, val_data, plan, is_stopped=lambda: stop() != 0)
    if loss is not None:
        if not isfinite(loss):
            _wait_for_saves(run)
            raise diverged(run, f"the val loss is {loss}")
        if run.step and loss < run.best_loss:
            run.best_loss, run.has_best = loss, False
        run.val_losses.append([run.step, loss])
        run.is_saved = not run.step  # before the first step there is nothing to save
        if run.progress:
            samples = sample_answers(run.learner.model, val_data, lambda: run.signals.stop != 0)
            run.progress.evaluation(run.step, loss, samples)
    return stop()


def _save(run: Run, is_step: bool, is_best: bool) -> None:
    """Save the run's state as a step file, and its weights as best_model.pt after that, on the main process."""
    if is_step:
        run.saved, run.is_saved, run.signals.save = step_file(run.folder, run.step), True, 0
    run.has_best = run.has_best or is_best

    def write(state: Mapping[str, Any]) -> None:
        if is_step:
            save_step(run.folder, state, run.options.keep_last, say)
        if is_best:
            save(run.folder / BEST, {key: value for key, value in state.items() if key != "optimizer"}, say)

    with run.processes.together():
        if run.progress:
            run.progress.log.flush()
            run.saver.write(write, run.state())


def _wait_for_saves(run: Run) -> None:
    with run.processes.together():
        run.saver.wait()
