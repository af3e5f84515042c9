"""--dry_run: everything before the first step is tried and shown as a table, and nothing is written.

The checks are those of an ordinary start (inputs.py, checks.py), which stops at the first that fails; here all are
made, and one that needs work: a micro-batch forward and backward, for the first loss, the time and a GPU's memory.
"""

import os
import signal
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from dataloader_instruct import ExampleStream, InstructData, Position
from errors import UserError, errors_at
from instruct_format import VOCAB_SIZE
from model import GPT
from training.checks import doubt_about_weights, doubts, existing, facts
from training.ending import Signals
from training.inputs import check_sizes, find_state, model_of, open_data, restore, split_data
from training.memory import computer_memory, fit, most_tokens, needed_bytes
from training.options import parse_options, resumed_options, with_steps
from training.precision import name_of
from training.processes import Processes, join, less_memory
from training.progress import columns, duration, say
from training.run import Run
from training.step import Learner
from weights.checkpoint import size_of
from weights.durable import LOCK, lock_folder

_NEEDS = "not checked, as it needs what failed above"


class Table:
    """What was looked at: name -> (ok, warning or failure, text)."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, str]] = {}
        self.processes = Processes(int(os.environ.get("RANK") or 0), 1, torch.device("cpu"))  # until they have joined

    def is_ok(self, *names: str) -> bool:
        return all(self.rows.get(name, ("",))[0] != "failure" for name in names)

    def add(self, status: str, name: str, text: str) -> None:
        if self.is_ok(name):
            self.rows[name] = (status, text)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """What is refused in here, on any process, is a failure of this name."""
        self.rows.setdefault(name, ("ok", "can be used"))
        try:
            with self.processes.together():
                yield
        except UserError as error:
            self.add("failure", name, str(error))

    def show(self) -> int:
        """Returns the exit code."""
        count = Counter(status for status, _ in self.rows.values())
        failed, rows = count["failure"], {f"{status:<8} {name}": text for name, (status, text) in self.rows.items()}
        verdict = f"{failed} of {len(rows)} checks failed" if failed else "the run can start"
        say(f"{columns(rows)}\n{verdict}, warnings: {count['warning']}; this was a dry run, nothing was written")
        return UserError.exit_code if failed else 0


def dry_run(argv: list[str] | None) -> int:
    """Look at everything that the run of this command line needs. Returns 0, or 2 if it could not start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save, and C++ may wait for another rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    options, table = parse_options(argv), Table()
    with table.check("device"):
        table.processes = join(options.device)
    with closing(table.processes):
        _look(argv, options, table)
    return table.show()


def _look(argv: list[str] | None, options: Namespace, table: Table) -> None:
    folder, path, state, model = Path(options.checkpoint_dir), Path(), None, None
    # each by itself, so that one failure hides no other
    with table.check("folders"), errors_at(folder):
        for each in (folder, Path(options.tensorboard_dir)):
            with errors_at(f"{each}: cannot write there"), tempfile.TemporaryFile(dir=existing(each)):
                pass
        if table.processes.is_main and (folder / LOCK).exists():
            with lock_folder(folder, is_named=False):
                pass
    with table.check("start"), errors_at(folder):
        path, state = find_state(options, folder)
        options = resumed_options(argv, state["options"], folder, path) if state else options
        table.add("ok", "start", f"goes on from {path} at step {state['step']}" if state else "a new run")
    if options.resume and not table.is_ok("start"):  # which would have said what its model and its data are
        return table.add("warning", "the rest", _NEEDS)
    with table.check("model"), table.processes.failures_explained("the model does not fit"):
        model, origin = model_of(options, state, path)
    if not table.is_ok("model"):
        model = None  # here too, if another process refuses it
    if model:
        with table.check("step"):
            check_sizes(options, model.config)
    with table.check("data"):
        prepared = open_data(options, state)
        options.context_length = options.context_length or 1024  # without a model
        data = split_data(prepared, options, model.config.vocab_size if model else VOCAB_SIZE)
    # together, if all is there
    if not model or not table.is_ok("data", "step", "device"):
        return table.add("warning", "the rest", _NEEDS)
    table.add("ok", "fingerprint", f"{prepared.manifest['fingerprint'][:12]}, of {prepared.manifest['source']}")
    stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
    with table.check("run"):
        options = with_steps(options, stream.steps_in, state, path)
    with table.check("device"):
        options, model.transformer.recompute = fit(options, model, table.processes)
    if not table.is_ok("device"):
        return None
    devices = table.processes.gather(name_of(table.processes.device))
    doubtful = doubts(options, model, data, stream, devices)
    for name, text in {**facts(options, table.processes, model, data, stream, origin), **doubtful}.items():
        table.add("warning" if name in doubtful else "ok", name, text)
    with table.check("memory"), table.processes.failures_explained(less_memory(options)):
        learner = _costs(options, model, data["train"], stream, table)
    if state and table.rows["memory"][0] == "ok":  # it takes as much again
        with table.check("start"):
            restore(Run(options, table.processes, Signals(), folder, prepared.manifest, data, stream, learner, ""),
                    state, path)


def _costs(options: Namespace, model: GPT, data: InstructData, stream: ExampleStream, table: Table) -> Learner:
    """The first loss, the memory and the time of the run, from a micro-batch on this device. Returns what computes it.
    """
    device, most = table.processes.device, most_tokens(options)
    is_cuda = device.type == "cuda"
    learner = Learner(model.to(device), options, table.processes,
                      lambda text: table.add("warning", "compile", text.removeprefix("warning: ")))
    # a micro-batch of the first step; on a CPU, where it may take minutes, two of its examples
    examples, _ = stream.step(Position())
    batch = data.micro_batch(data.plan(examples, most, 1).micro_batches[0] if is_cuda else examples[:2]).to(device)
    loss = learner.add_gradients(batch, 0.0).item() / max(1, len(batch.targets))
    begin = time.perf_counter()  # the first time also started everything up
    learner.add_gradients(batch, 0.0).item()
    seconds = time.perf_counter() - begin
    # what that says of the run
    doubt = "" if options.from_scratch else doubt_about_weights(loss)
    table.add("warning" if doubt else "ok", "first loss", doubt or f"{loss:.2f} nats a response token")
    if is_cuda:
        needed = torch.cuda.max_memory_allocated(device) + 2 * size_of(model.state_dict())  # and the two moments
        there = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:  # the processes share it
        needed = needed_bytes(model, most, model.transformer.recompute, learner.product_type.itemsize)
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        there = computer_memory()
    more = f": {less_memory(options)}" * (needed > there)
    table.add("warning" if more else "ok", "memory", f"about {needed / 1e9:.1f} GB for micro-batches of {most:,}"
              f" tokens, {there / 1e9:.1f} GB are there{more}")
    a_step = seconds * int(data.lengths.sum()) / len(batch.tokens) / stream.steps_per_epoch
    a_step /= table.processes.world_size if is_cuda else 1
    table.add("ok", "time", f"about {a_step:,.2f} s a step, {duration(a_step * options.max_steps)} in all")
    return learner
