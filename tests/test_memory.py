"""The micro-batch that fits a GPU's memory, and saves that are written while the run goes on."""

import errno
import gc
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SRC, run_command
from errors import UserError
from helpers import open_data, train, trajectory, write_data
from model import GPT, GPTConfig
from models import gradients_of, learner_of, options_of, same_state, small_model
from training import setup
from training.memory import fit, needed_bytes
from training.processes import Processes
from training.step import train_step
from training.threads import Saver
from weights import checkpoint

GPU = torch.device("cuda:0")
SHAPES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}


def model_named(name: str) -> GPT:
    n_layer, n_head, n_embd = SHAPES[name]
    with torch.device("meta"):
        return GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))


def fitted(monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: float, *flags: object,
           world_size: int = 1) -> tuple[int, str]:
    """On a GPU with so much free memory; of compute capability 7.5 where it is 16 GB, else 8.9."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gigabytes * 1e9), 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5) if gigabytes == 16 else (8, 9))
    options = options_of("--context_length", 1024, *flags)
    found, recompute = fit(options, model_named(name), Processes(0, world_size, GPU))
    assert found.asked == {"precision": options.precision, "mini_batch_size": options.mini_batch_size}
    return found.mini_batch_size, recompute


@pytest.mark.parametrize("name, gigabytes, asked, flags, expected", [
    ("124M", 16, 0, (), (37, "gelu")), ("124M", 80, 0, (), (64, "nothing")), ("355M", 24, 0, (), (17, "gelu")),
    ("124M", 24, 0, ("--precision", "fp32"), (37, "gelu")), ("774M", 80, 0, (), (37, "gelu")),
    ("124M", 24, 0, ("--gradient_checkpointing",), (64, "blocks")), ("1558M", 24, 0, (), (1, "gelu")),
    ("124M", 16, 8, (), (8, "nothing")), ("355M", 16, 8, (), (8, "gelu")), ("1558M", 80, 8, (), (8, "nothing")),
    ("1558M", 80, 8, ("--gradient_checkpointing",), (8, "blocks"))])
def test_the_largest_micro_batch_that_fits(monkeypatch, name, gigabytes, asked, flags, expected):
    """At most a step's 64, at least 1; one example more would not fit. One that was asked for stays as it is."""
    size, recompute = fitted(monkeypatch, name, gigabytes, "--mini_batch_size", asked, *flags)
    assert (size, recompute) == expected
    width, room = 4 if "fp32" in flags else 2, 0.9 * gigabytes * 1e9
    least = "blocks" if "--gradient_checkpointing" in flags else "gelu"
    assert asked or size in (1, 64) or needed_bytes(model_named(name), (size + 1) * 1024, least, width) > room
    assert asked or size == 1 or needed_bytes(model_named(name), size * 1024, recompute, width) <= room


class Gelus(TorchDispatchMode):
    """References to the results of each GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[StorageWeakRef] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        if operator is torch.ops.aten.gelu.default:
            self.results.append(StorageWeakRef(result.untyped_storage()))
        return result


@pytest.mark.usefixtures("with_onednn")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_not_kept(inputs, precision):
    """And changes no bit of loss and gradients. --gradient_checkpointing keeps less of everything else too."""
    batch, kept, found = open_data(inputs[0])["train"].micro_batch(range(8)), [], []
    for recompute, is_again in (("nothing", False), ("gelu", True), ("blocks", True)):
        model, sizes = small_model(), list[int]()
        model.transformer.recompute = recompute
        learner = learner_of(model, "--precision", precision)
        with Gelus() as gelus:
            hidden = learner.hidden_of(batch.tokens, batch.documents, batch.rows)
            assert [result.expired() for result in gelus.results] == [is_again, is_again] and hidden.requires_grad
        with Gelus() as gelus, saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            found.append([learner.add_gradients(batch, 1.0), gradients_of(learner)])
        assert len(gelus.results) == 2 + 2 * is_again
        kept.append(sum(sizes))
    assert kept[2] < 0.8 * kept[1] and same_state(found, [found[0]] * 3)


def test_processes_share_a_step_and_the_smallest_gpu_decides(monkeypatch):
    """Four of them have a fourth of a step's 64 each; GPUs that differ take what fits the smallest."""
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [mine] * 4)
    assert fitted(monkeypatch, "124M", 80, "--mini_batch_size", 0, world_size=4) == (16, "nothing")
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [mine, 5 if mine == 16 else mine])  # 5 fit on a rank
    assert fitted(monkeypatch, "124M", 80, "--mini_batch_size", 0, world_size=4) == (5, "nothing")


@pytest.mark.parametrize("flags, expected", [((), "gelu"), (("--gradient_checkpointing",), "blocks")])
def test_a_cpu_takes_the_usual_micro_batch(flags, expected):
    options = options_of("--mini_batch_size", 0, "--context_length", 1024, *flags)
    found, recompute = fit(options, model_named("124M"), Processes(0, 1, torch.device("cpu")))
    assert (found.mini_batch_size, found.precision, recompute) == (8, "fp32", expected)


@pytest.mark.parametrize("others, agreed", [(["bf16", "bf16"], "bf16"), (["bf16", "fp16"], "fp16")])
def test_all_gpus_multiply_in_the_type_that_all_have(monkeypatch, others, agreed):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [mine] * 2 if isinstance(mine, list) else others)
    found, _ = fit(options_of("--context_length", 1024), model_named("124M"), Processes(0, 2, GPU))
    assert (found.precision, found.asked["precision"]) == (agreed, "auto")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_learner_that_is_not_used_any_more_leaves_nothing(tmp_path, precision):
    """Neither weights nor gradients: a parameter's hooks are where Python's collector does not look."""
    data = open_data(write_data(tmp_path, {"train": [([1, 2], [0, 1])], "val": [([1, 2], [0, 1])]}))["train"]
    learner = learner_of(None, "--precision", precision)
    train_step(learner, data, data.plan([0], 1024, 1), 1e-3)
    left = [ref(learner), ref(learner.gradients), *map(ref, learner.model.parameters())]
    del learner
    gc.collect()
    assert [each() for each in left] == [None] * len(left)


def changing_state() -> dict[str, Any]:
    return {"step": 3, "losses": [[1, 2.0]], "model": {"a": torch.ones(3), "b": torch.arange(4)},
            "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "betas": (0.9, 0.95)}}


MANY_SIZES = """
import os, sys, torch
from pathlib import Path
from processor import linear_by_onednn
torch.set_num_threads(1)
weight, memory = torch.ones(2048, 512), []
for rows in range(64, 544):
    linear_by_onednn(torch.ones(rows, 512), weight)
    memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
print(memory[-1] - memory[240])
"""


def test_products_of_ever_new_sizes_leave_nothing():
    """Of the second 240 sizes, when malloc has settled too, oneDNN and PyTorch would keep 140 MiB more; of a 124M
    model's, gigabytes."""
    unset = ("-u", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "-u", "LRU_CACHE_CAPACITY")  # which this process has set
    done = run_command("env", *unset, sys.executable, "-c", MANY_SIZES, env={"PYTHONPATH": str(SRC)})
    assert done.code == 0 and float(done.stdout) < 30, done


def test_a_later_save_writes_the_state_as_it_was_when_it_was_asked_for():
    """Although everything in it changes before the thread gets there. Without a thread the state itself is written."""
    state, may_write, written = changing_state(), threading.Event(), list[Mapping[str, Any]]()

    def write(found: Mapping[str, Any]) -> None:
        assert may_write.wait(60)
        written.append(found)

    saver = Saver(is_later=True)
    saver.write(write, state)
    state["model"]["a"].zero_()
    state["optimizer"]["state"][0]["step"] += 1
    state["losses"][0][1] = 5.0
    state["losses"].append([2, 1.0])
    assert not written
    may_write.set()
    saver.wait()
    saver.close()
    expected = changing_state()
    expected["optimizer"]["betas"] = [0.9, 0.95]
    assert same_state(written, [expected])
    Saver(is_later=False).write(written.append, state)
    assert written[1] is state


@pytest.mark.parametrize("when", ["the next", "at the end", "nobody waits"])
def test_an_error_of_a_later_save_is_raised_by_the_next_or_at_the_end(when):
    """Or said, where nobody waits for it."""
    def fail(state: Mapping[str, Any]) -> None:
        raise UserError("the disk is full")

    said, written = list[str](), list[Mapping[str, Any]]()
    saver = Saver(True, said.append)
    saver.write(fail, {})
    if when != "nobody waits":
        with pytest.raises(UserError, match="the disk is full"):
            saver.wait() if when == "at the end" else saver.write(written.append, {})
        saver.wait()  # once
    saver.close()
    assert said == ["error: the disk is full"] * (when == "nobody waits")
    assert written == [{}] * (when == "the next")  # what comes after it is tried all the same


def test_a_run_that_saves_later_ends_in_the_same_bits(inputs, tmp_path, monkeypatch, capsys):
    """Every file of it, of all 24 steps, and it is written by another thread."""
    assert train(inputs, tmp_path / "at_once") == 0
    threads, real = set(), torch.save
    monkeypatch.setattr(torch, "save", lambda *both: threads.add(threading.current_thread()) or real(*both))
    monkeypatch.setattr(setup, "waits_for_disk", lambda _: True)  # as on a GPU
    assert train(inputs, tmp_path / "later") == 0
    assert threading.main_thread() not in threads and len(threads) == 1
    names = sorted(path.name for path in (tmp_path / "later").glob("*.pt"))
    assert len(names) == 26 and names == sorted(path.name for path in (tmp_path / "at_once").glob("*.pt"))
    for name in names:
        assert same_state(*(trajectory(tmp_path / folder / name) for folder in ("later", "at_once"))), name
    assert capsys.readouterr().out.count("saved ") >= 48


@pytest.mark.parametrize("step", [5, 24])
def test_a_full_disk_ends_a_run_that_saves_later_and_leaves_valid_files(inputs, tmp_path, monkeypatch, step):
    """In mid run and at the last save: exit code 2, and latest.pt is the newest whole file."""
    real = checkpoint.save

    def save(path: Path, *others: Any) -> None:
        if path.name >= f"step_{step:06d}.pt":
            monkeypatch.setattr(os, "fsync", full)
        real(path, *others)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(setup, "waits_for_disk", lambda _: True)
    with pytest.raises(UserError, match=f"step_{step:06d}.pt: cannot write it: No space left on device") as raised:
        train(inputs, tmp_path)
    assert raised.value.exit_code == 2
    steps = sorted(checkpoint.load_run(path)["step"] for path in tmp_path.glob("step_*"))
    assert steps == list(range(1, step)) and checkpoint.load_run(tmp_path / "latest.pt")["step"] == step - 1
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 4  # random data: it is never better
    assert not list(tmp_path.glob("*.tmp"))
