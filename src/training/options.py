"""The trainer's options: each once, with its default, its meaning, and what a resumed run may do with it."""

import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cli import Parser, matching, number
from errors import CheckpointError, UserError

# What may change when a run is resumed. Options that are not on the command line keep the value of the run.
FIXED = "fixed"  # the model: never
TRAJECTORY = "trajectory"  # what the remaining steps compute: only with --override
FREE = "free"  # how it is computed, watched and stored: always
_COUNT, _SIZE, _RATE = number(int, 1, 10**9), number(int, 0, 10**9), number(float, 0)
_SHAPE = matching(r"|0*[1-9]\d*(,0*[1-9]\d*){2}", "layers,heads,width such as 4,4,128")
_PRECISION = matching("auto|fp32|bf16|fp16", "auto, fp32, bf16 or fp16")
_SWITCH = matching("off|on", "off or on")
_PATH = matching("[^\ud800-\udfff]*", "a path in UTF-8, as PyTorch needs")

# title of a group -> name -> (on resume, type, default, meaning)
TABLE: dict[str, dict[str, tuple[str, Any, Any, str]]] = {
    "model and data": {
        "pretrained_model": (FIXED, _PATH, "checkpoints/best_model.pt", "the pre-trained GPT-2 to start from: a "
                             "file, or a Hugging Face folder"),
        "from_scratch": (FIXED, _SHAPE, "", "start from random weights instead: layers,heads,width such as 4,4,128"),
        "n_head": (FIXED, _SIZE, 0, "its attention heads, where the weights do not say it (default: what they say)"),
        "data_dir": (FREE, str, "data_instruct", "prepared data; a resumed run checks that they are the same"),
        "context_length": (FIXED, _SIZE, 0, "longest example, in tokens; 0 takes the model's own"),
    },
    "steps": {
        "total_batch_size": (TRAJECTORY, number(int, 1, 1 << 30), 65536,
                             "tokens (not examples) of one step, over all processes"),
        "mini_batch_size": (FREE, _SIZE, 8, "a micro-batch holds at most this many times context_length tokens; "
                            "halve it when memory runs out, the results stay the same; 0 takes what fits a GPU"),
        "gradient_checkpointing": (FREE, _SWITCH, "off", "on (or no word) keeps less of each layer for the backward "
                                   "pass and computes it again: for large models; same results"),
        "precision": (FREE, _PRECISION, "auto", "type of the products: fp32, bf16, fp16, or auto: bf16 on GPUs that "
                      "have it, fp16 on older ones, fp32 on CPUs"),
        "compile": (FREE, _SWITCH, "off", "on (or no word) compiles the model for a GPU, which takes a minute"),
        "loss_on": (TRAJECTORY, matching("response|all", "response or all"), "response", "train on responses only, or "
                    "on all (tokens); the val loss is that of the responses in any case"),
        "max_steps": (TRAJECTORY, _COUNT, 2000, "optimizer steps of the whole run"),
        "seed": (TRAJECTORY, number(int, 0, 2**63 - 1), 1337, "decides the order of examples and random weights"),
    },
    "optimizer": {
        "learning_rate": (TRAJECTORY, number(float, 0, above=True), 2e-5, "highest learning rate"),
        "min_lr": (TRAJECTORY, _RATE, 2e-6, "learning rate at the end of the cosine"),
        "warmup_steps": (TRAJECTORY, _SIZE, 100, "steps of linear warm-up"),
        "weight_decay": (TRAJECTORY, _RATE, 0.01, "AdamW's decay, on matrices only"),
        "grad_clip": (TRAJECTORY, number(float, 0, above=True), 1.0, "largest gradient norm"),
    },
    "evaluation and checkpoints": {
        "eval_freq": (FREE, _COUNT, 100, "steps between evaluations"),
        "eval_examples": (TRAJECTORY, _SIZE, 0, "evaluate on the first N val examples; 0 takes all"),
        "patience": (FREE, _SIZE, 0, "stop when this many evaluations in a row brought no lower val loss; 0: never"),
        "checkpoint_freq": (FREE, _COUNT, 100, "steps between checkpoints"),
        "keep_last": (FREE, _COUNT, 2, "how many step_NNNNNN.pt files stay"),
        "checkpoint_dir": (FREE, _PATH, "checkpoints_instruct", "where checkpoints go"),
        "tensorboard_dir": (FREE, _PATH, "runs_instruct", "where TensorBoard logs go"),
        "log_freq": (FREE, _COUNT, 10, "steps between progress lines when the output is not a terminal"),
    },
}
ON_RESUME = {name: option[0] for group in TABLE.values() for name, option in group.items()}


def _parse(argv: list[str] | None, run: Mapping[str, Any]) -> Namespace:
    """The options, their defaults replaced by those of a run: as text, so that they are checked as flags are."""
    parser = Parser("Fine-tune a GPT-2 on prepared instruction data. NPROC: processes, one a GPU (default 1; without a "
                    "GPU they share the CPU). RESUME: a checkpoint file, latest, or auto: latest if a run is there, "
                    "else a new one.", usage="./start_instruct_training.sh [demo | [NPROC] [RESUME]] [flags...]")
    for title, table in TABLE.items():
        group = parser.add_argument_group(title)
        for name, (_, kind, default, meaning) in table.items():
            if name != "from_scratch":  # which excludes the one before
                one = group.add_mutually_exclusive_group()
            how: dict[str, Any] = {"nargs": "?", "const": "on"} if default == "off" else {}
            one.add_argument(f"--{name}", type=kind, default=str(run.get(name, default)), help=meaning, **how)
            if name == "max_steps":
                one.add_argument("--epochs", type=number(float, 0, 10**6, above=True), help="instead of "
                                 "--max_steps: as many steps as go through the data this often; 3 is usual")
    group = parser.add_argument_group("this process")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    group.add_argument("--resume", metavar="PATH|latest|auto",
                       help="go on from this checkpoint, or from the newest valid one of --checkpoint_dir; auto starts "
                            "a new run when there is none")
    group.add_argument("--dry_run", action="store_true", help="check everything that the run needs, say what is wrong "
                       "and what to do, and change nothing")
    group.add_argument("--override", action="store_true", help="let a resumed run change its trajectory: " + ", ".join(
        name for name, on_resume in ON_RESUME.items() if on_resume == TRAJECTORY))
    return parser.parse_args(argv)


def parse_options(argv: list[str] | None) -> Namespace:
    """The options of a new run. A run that is resumed from a file has its checkpoints beside it."""
    options = _parse(argv, {})
    is_file = options.resume not in (None, "latest", "auto")
    return _parse(argv, {"checkpoint_dir": Path(options.resume).parent}) if is_file else options


def resumed_options(argv: list[str] | None, run: Mapping[str, Any], folder: Path, source: Path) -> Namespace:
    """The options of the run that is resumed, changed by the command line; its checkpoints go to folder.

    Raises CheckpointError when source, which they come from, has one that the command line would not take; UserError
    for a change to a fixed option, and for a change of trajectory without --override: both name both values, all
    changes at once.
    """
    usual = _parse([], {})  # what every start names by itself may be a link to a larger disk
    try:
        outside = [name for name in ("data_dir", "tensorboard_dir") if name in run and run[name] != getattr(usual, name)
                   and not Path(str(run[name])).resolve().is_relative_to(Path.cwd())]
        run_here = {**run, **dict.fromkeys(outside, ""), "checkpoint_dir": folder}
        before = _parse([], run_here)
    except (UserError, ValueError) as error:  # a path with a zero in it
        raise CheckpointError(f"{source}: not a usable checkpoint, its options: {error}") from error
    options = _parse(argv, run_here)
    if unnamed := {name: run[name] for name in outside if not getattr(options, name)}:
        flags = " ".join(f"--{name} {shlex.quote(str(path))}" for name, path in unnamed.items())
        raise UserError(f"{source} names folders outside this one, as a file from elsewhere could; if they are right, "
                        f"add: {flags}")
    options.context_length = options.context_length or before.context_length  # 0: the model's, which the run has found
    changes = {name: f"--{name} was {getattr(before, name)}, now {getattr(options, name)}" for name in ON_RESUME
               if getattr(before, name) != getattr(options, name)}
    if fixed := [change for name, change in changes.items() if ON_RESUME[name] == FIXED]:
        raise UserError(f"the resumed run cannot change: {'; '.join(fixed)}")
    trajectory = [change for name, change in changes.items() if ON_RESUME[name] == TRAJECTORY]
    if trajectory and not options.override:
        raise UserError(f"this would change the run's trajectory: {'; '.join(trajectory)}; add --override if that is "
                        "meant")
    return options


def with_steps(options: Namespace, steps_in: Callable[[float], int], state: Mapping[str, Any] | None,
               source: Path) -> Namespace:
    """The options with max_steps as --epochs says. From here on max_steps is what counts, in checkpoints too.

    Raises UserError where that changes a resumed run's trajectory without --override, or leaves nothing to do.
    """
    steps = steps_in(options.epochs) if options.epochs else options.max_steps
    if state and steps != options.max_steps and not options.override:
        raise UserError(f"--epochs {options.epochs:g} is {steps} steps, the run's --max_steps is {options.max_steps}: "
                        "this would change its trajectory; add --override if that is meant")
    if state and state["step"] > steps:
        raise UserError(f"nothing to do: {source} is at step {state['step']}, --max_steps is {steps}")
    return Namespace(**{**vars(options), "max_steps": steps})
