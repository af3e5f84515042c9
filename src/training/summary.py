"""What a run says at its end: which model is best, how good, beside what it was before, and what to do next."""

import shlex
from pathlib import Path

from errors import DivergedError, python
from training.progress import columns, duration
from training.run import Run
from weights.checkpoint import BEST, LATEST

FAR = 0.8  # a best step before this part of the run was far from its end


def summary(run: Run, reason: str, seconds: float, steps: int) -> str:
    """A line on how it ended, then names and texts. seconds and steps are those since this start."""
    latest = run.folder / LATEST
    if not latest.exists():
        return f"{reason} at step {run.step}; there was nothing to save"
    order, lengths = run.stream.order(run.position.epoch), run.data["train"].lengths
    tokens = run.position.epoch * int(lengths.sum()) + int(lengths[order[:run.position.index]].sum())
    epochs = run.position.epoch + run.position.index / len(lengths)
    rows = {"trained": f"{run.step:,} steps, {epochs:.2f} epochs, {tokens:,} tokens"
                       + f"; {steps:,} steps in {duration(seconds)} since this start" * (steps > 0)}
    best, path = run.best(), run.folder / BEST
    if best:
        (first_step, first), (last_step, last), (best_step, lowest) = run.val_losses[0], run.val_losses[-1], best
        before = "before training" if first_step == 0 else f"at step {first_step}"
        is_there = run.best_loss == lowest and path.exists()
        place = f", in {path}" if is_there else f"; {path} has other weights, or is not there"
        rows["best"] = f"val loss {lowest:.4f}, at step {best_step}{place}"
        rows["val loss"] = f"{first:.4f} {before}, {last:.4f} at step {last_step}"
        if first_step == 0 and lowest >= first:
            rows["warning"] = ("the model never got better than it was before training; try a lower --learning_rate, "
                               "or look at the samples that the preparation prints")
        elif best_step < FAR * last_step:
            rows["note"] = (f"the best step lies far before the last: --max_steps {best_step} would have done"
                            + ", and --patience 3 stops by itself" * (not run.options.patience))
    chosen = shlex.quote(str(path if path.exists() else latest))
    if run.step < run.options.max_steps or run.step not in [at for at, _ in run.val_losses]:  # not evaluated
        more = " --patience 0" * bool(run.options.patience and run.evaluations_in_vain() >= run.options.patience)
        count = f"{run.processes.world_size} " * (run.processes.world_size > 1)
        folders = {name: Path(getattr(run.options, name)) for name in ("data_dir", "tensorboard_dir")}
        named = "".join(f" --{name} {shlex.quote(str(path))}" for name, path in folders.items()
                        if not path.resolve().is_relative_to(Path.cwd()))  # which a resume has to name again
        rows["go on"] = f"./start_instruct_training.sh {count}{shlex.quote(str(latest))}{named}{more}"
    rows["chat"] = f"./chat.sh {chosen}"
    rows["export"] = f"{python()} src/convert_checkpoint.py export {chosen} exported"
    return f"{reason} at step {run.step}; the run's state is {latest}\n{columns(rows)}"


def diverged(run: Run, what: str) -> DivergedError:
    """What a run ends with that no step can mend."""
    last = f"the last good checkpoint is {run.saved}" if run.saved else "there is no checkpoint yet"
    advice = "try " + ("a lower --learning_rate" if run.step else "another --pretrained_model")
    advice += ", or --precision fp32" * (run.options.precision == "fp16")
    return DivergedError(f"{what}, up to step {run.step}; {last}; {advice}")
