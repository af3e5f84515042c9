"""The trainer's options: each once, with its default, its meaning, and what a resumed run may do with it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli import Parser, UserError, number

# What may change when a run is resumed. Options that are not given keep the value of the run.
FIXED = "fixed"  # the model and its data: never
TRAJECTORY = "trajectory"  # what the remaining steps compute: only with --override
FREE = "free"  # how it is computed, watched and stored: always
_AT_LEAST_1 = number(int, 1)


class OptionTable:
    """An argument parser that also knows the resume class of every option."""

    def __init__(self) -> None:
        self.parser = Parser("Fine-tune a GPT-2 on prepared instruction data.")
        self.on_resume: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}

    def group(self, title: str) -> None:
        self._group = self.parser.add_argument_group(title)

    def add(self, flag: str, on_resume: str, default: Any, help: str, **arguments: Any) -> None:
        name = flag.removeprefix("--")
        self.on_resume[name], self.defaults[name] = on_resume, default
        # Not given is told apart from the default, so that a resumed run can keep what it was started with.
        self._group.add_argument(flag, default=None, help=f"{help} (default: {default})", **arguments)


def option_table() -> OptionTable:
    table = OptionTable()
    add = table.add
    table.group("model and data")
    add("--pretrained_model", FIXED, "checkpoints/best_model.pt", "the pre-trained GPT-2 to start from")
    add("--from_scratch", FIXED, "", "start from random weights instead: layers,heads,width such as 4,4,128")
    add("--data_dir", FREE, "data_instruct", "prepared data; a resumed run checks that they are the same")
    add("--context_length", FIXED, 0, "longest example, in tokens; 0 takes the model's own", type=number(int, 0))
    table.group("steps")
    add("--total_batch_size", TRAJECTORY, 65536, "tokens (not examples) of one step, over all processes",
        type=_AT_LEAST_1)
    add("--mini_batch_size", FREE, 8, "a micro-batch holds at most this many times context_length tokens; halve it "
        "when memory runs out, the results stay the same", type=_AT_LEAST_1)
    add("--max_steps", TRAJECTORY, 2000, "optimizer steps of the whole run", type=_AT_LEAST_1)
    add("--seed", TRAJECTORY, 1337, "decides the order of examples and random weights", type=number(int, 0))
    table.group("optimizer")
    add("--learning_rate", TRAJECTORY, 2e-5, "highest learning rate", type=number(float, 0, above=True))
    add("--min_lr", TRAJECTORY, 2e-6, "learning rate at the end of the cosine", type=number(float, 0))
    add("--warmup_steps", TRAJECTORY, 100, "steps of linear warm-up", type=number(int, 0))
    add("--weight_decay", TRAJECTORY, 0.01, "AdamW's decay, on matrices only", type=number(float, 0))
    add("--grad_clip", TRAJECTORY, 1.0, "largest gradient norm", type=number(float, 0, above=True))
    table.group("evaluation and checkpoints")
    add("--eval_freq", FREE, 100, "steps between evaluations", type=_AT_LEAST_1)
    add("--eval_examples", TRAJECTORY, 0, "evaluate on the first N val examples; 0 takes all", type=number(int, 0))
    add("--checkpoint_freq", FREE, 100, "steps between checkpoints", type=_AT_LEAST_1)
    add("--keep_last", FREE, 2, "how many step_NNNNNN.pt files stay", type=_AT_LEAST_1)
    add("--checkpoint_dir", FREE, "checkpoints_instruct", "where checkpoints go")
    add("--tensorboard_dir", FREE, "runs_instruct", "where TensorBoard logs go")
    add("--log_freq", FREE, 10, "steps between progress lines when the output is not a terminal", type=_AT_LEAST_1)
    table.group("this process")
    add("--device", FREE, "auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    table.parser.add_argument("--resume", metavar="PATH|latest", help="go on from this checkpoint, or from the newest "
                              "valid one of --checkpoint_dir")
    table.parser.add_argument("--override", action="store_true", help="let a resumed run change its trajectory: "
                              + ", ".join(n for n, c in table.on_resume.items() if c == TRAJECTORY))
    return table


def parse_options(argv: list[str] | None) -> Namespace:
    """The options as given; those that were not given are None until complete_options."""
    return option_table().parser.parse_args(argv)


def complete_options(given: Namespace, saved: Mapping[str, Any] | None = None) -> Namespace:
    """Fill in what was not given: from the run that is resumed (saved), else with the defaults.

    Raises UserError for a change to a fixed option, and for a change of trajectory without --override;
    both name both values, all changes at once.
    """
    table = option_table()
    complete = Namespace(resume=given.resume, override=given.override)
    changes: dict[str, list[str]] = {FIXED: [], TRAJECTORY: [], FREE: []}
    for name, default in table.defaults.items():
        value = getattr(given, name)
        if name == "context_length" and saved is not None:
            value = value or None  # 0 asks for the model's, which the run has settled
        before = default if saved is None else saved.get(name, default)
        if saved is not None and value is not None and value != before:
            changes[table.on_resume[name]].append(f"--{name} was {before}, now {value}")
        setattr(complete, name, before if value is None else value)
    if changes[FIXED]:
        raise UserError(f"the resumed run cannot change: {'; '.join(changes[FIXED])}")
    if changes[TRAJECTORY] and not given.override:
        raise UserError(f"this would change the run's trajectory: {'; '.join(changes[TRAJECTORY])}; "
                        "add --override if that is meant")
    _check_together(complete)
    return complete


def _check_together(options: Namespace) -> None:
    complaints = []
    if options.min_lr > options.learning_rate:
        complaints.append(f"--min_lr {options.min_lr} is above --learning_rate {options.learning_rate}")
    if options.from_scratch:
        sizes = options.from_scratch.split(",")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            complaints.append(f"--from_scratch takes layers,heads,width such as 4,4,128, not {options.from_scratch!r}")
    if complaints:
        raise UserError("; ".join(complaints))


def checkpoint_dir_of(given: Namespace) -> Path:
    """Where the run's checkpoints are: as given, else beside the file that is resumed, else the default."""
    if given.checkpoint_dir is not None:
        return Path(given.checkpoint_dir)
    if given.resume not in (None, "latest"):
        return Path(given.resume).parent
    return Path(option_table().defaults["checkpoint_dir"])
