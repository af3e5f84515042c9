"""The processes of a run: rank and device, sums over ranks, and errors that all ranks share."""

import json
import os
import platform
import re
import time
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import LostError, UserError
from training.precision import device_named, failures_explained
from weights.durable import LOCK

HOST = platform.node()
MEETING = 120.0  # seconds that the GPUs may take for their first sum
_NO_P2P = "; if the GPUs cannot read each other's memory, as in some computers and virtual machines: NCCL_P2P_DISABLE=1"
_never_destroyed: list[object] = []


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. One process needs no process group, several use nccl or gloo."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, mine: object) -> list[Any]:
        """What each rank has, rank by rank. It travels as JSON: nothing that comes from a network is unpickled."""
        if self.world_size == 1:
            return [mine]
        text = json.dumps(mine).encode()
        longest = torch.tensor(len(text))  # of the CPU: no rank waits for its GPU here
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.tensor(list(text.ljust(int(longest))), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(found, padded)
        return [json.loads(bytes(each.tolist())) for each in found]

    def largest(self, *values: int) -> list[int]:
        """The largest of all ranks' values, one by one: what one rank noticed, all know."""
        return [max(each) for each in zip(*self.gather(values))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all ranks at the end of the block. When it failed on any of them it fails on all, with the first
        rank's UserError, which says on which host it happened if there are several."""
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        except OSError as caught:
            error = UserError(f"{caught.filename or HOST}: {caught.strerror or caught}")
        found = self.gather([HOST, error and error.exit_code, str(error)]) if self.world_size > 1 else []
        for host, code, text in found:
            if code:
                several = len({host for host, _, _ in found}) > 1
                error = UserError((f"{host}: " if host == HOST else f"stopped by {host}: ") * several + text)
                error.exit_code = code
                break
        if error:
            raise error

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raise UserError on all ranks, naming what differs and where, unless all have the same facts."""
        _refuse_differences(self.gather([HOST, dict(facts)]))

    def check_shared(self, folder: Path) -> None:
        """Raise UserError on all ranks unless they see what rank 0 wrote into the folder, within some seconds."""
        def mark() -> str:
            with suppress(OSError):
                return (folder / LOCK).read_text()
            return ""

        expected = self.gather(mark())[0]
        with self.together():
            for _ in range(20):
                if mark() == expected:
                    return
                time.sleep(0.25)
            raise UserError(f"{folder}: not the folder of rank 0; all hosts have to share --checkpoint_dir")

    @contextmanager
    def failures_explained(self, advice: str = "") -> Iterator[None]:
        """What the device refuses in here becomes a UserError with what to do, a lost process LostError."""
        try:
            with failures_explained(self.device, advice):
                yield
        except RuntimeError as error:
            text = str(error)
            if self.world_size == 1 or ("gloo" not in text and not isinstance(error, dist.DistError)):
                raise
            if "shared memory" in text:
                raise UserError("the processes of the GPUs lack shared memory (/dev/shm); a container gets more with "
                                "--shm-size 1g") from error
            time.sleep(1)  # the process that knows more is the first to say so
            raise LostError(f"{HOST}: rank {self.rank} has lost another process of the run ({_reason_in(text)})"
                            ) from error

    def close(self) -> None:
        """Leave the process group, but keep its C++ object: its destructor waits, holding the interpreter's lock, for
        gloo's threads, which may wait for that lock (a deadlock of torch 2.13 in one of twenty runs)."""
        if self.world_size > 1:
            _never_destroyed.append(dist.group.WORLD)
            dist.destroy_process_group()


def _reason_in(text: str) -> str:
    """The part of gloo's or NCCL's many lines that says why."""
    return (text.partition("Last error:")[2].strip() or text).partition("\n")[0].partition(". ")[0]


def less_memory(options: Namespace, go_on: str = "") -> str:
    """The flags that need less memory; go_on comes before those with which the same run can go on."""
    if options.mini_batch_size > 1:
        return f"{go_on}--mini_batch_size {options.mini_batch_size // 2}; the results stay the same"
    if options.gradient_checkpointing == "off":
        return f"{go_on}--gradient_checkpointing; the results stay the same"
    return "not even one example fits; a new run with a smaller --context_length leaves long ones out"


def digest(value: object, crc: int = 0) -> int:
    """A checksum of everything in nested tensors and plain values."""
    if isinstance(value, torch.Tensor):
        return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    if not isinstance(value, (Mapping, list, tuple)):
        return zlib.crc32(repr(value).encode(), crc)
    for part in value.items() if isinstance(value, Mapping) else value:
        crc = digest(part, crc)
    return crc


def comparable(options: Namespace) -> dict[str, object]:
    """What all processes have to be started with, beside data and weights; where those lie may differ."""
    own = {"pretrained_model", "data_dir", "checkpoint_dir", "tensorboard_dir", "resume"}
    program = [(path.name, path.read_bytes()) for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return {**{f"--{name}": value for name, value in vars(options).items() if name not in own},
            "the program in src/": digest(program), "torch": torch.__version__}


def _refuse_differences(found: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Raise UserError unless all ranks, each with its host, have the same facts."""
    different = []
    for name in found[0][1]:
        if len({str(facts.get(name)) for _, facts in found}) > 1:
            places = dict.fromkeys(f"{facts.get(name)} on {host}" for host, facts in found)
            different.append(f"{name} is {', '.join(places)}")
    if different:
        raise UserError(f"the processes were started differently: {'; '.join(different)}")


def join(device_name: str) -> Processes:
    """Find this process's rank and device from the launcher's environment, and join the process group if there is one.

    Raises UserError when the device is not there, and for an environment that no launcher has made.
    """
    rank, world_size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    if rank >= world_size or world_size > 1 and os.environ.keys().isdisjoint(("INSTRUCT_STORE", "MASTER_ADDR")):
        raise UserError(f"the environment has RANK {rank} and WORLD_SIZE {world_size}, as no launcher leaves it; unset "
                        "them, or start with ./start_instruct_training.sh")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device_name = device_named(device_name)
    if device_name == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > torch.cuda.device_count():  # every process of the machine notices, so none waits for another
            raise UserError(f"{here} processes for {torch.cuda.device_count()} GPUs; start fewer")
    if device_name == "mps" and world_size > 1:
        raise UserError("--device mps takes one process; start one, or add --device cpu")
    device = torch.device(f"cuda:{local_rank}" if device_name == "cuda" else device_name)
    processes = Processes(rank, world_size, device)
    try:
        with processes.failures_explained():
            _connect(processes)
    except LostError as error:
        text = str(error.__cause__)
        if not re.search("unhandled cuda error|Cuda failure|invalid usage", text):  # a process may have died
            raise
        raise UserError(f"NCCL does not start: {_reason_in(text)}; NCCL_DEBUG=INFO shows more{_NO_P2P}") from error
    return processes


def _connect(processes: Processes) -> None:
    """Take the device, and meet the other processes."""
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        timeout = timedelta(minutes=30)  # a save may take long; the launchers notice a dead link much sooner
        where = os.environ.get("INSTRUCT_STORE", "env://")
        is_file = where.startswith("file://")  # on a single host; as a URL, a path may have no ? and no #
        met = (dist.FileStore(where.removeprefix("file://"), world_size) if is_file else  # type: ignore[attr-defined]
               next(rendezvous("env://", rank, world_size, timeout=timeout))[0])
        # each start of the run, whose number the name ends with, has a part of the store of its own
        store = dist.PrefixStore(where, met)  # type: ignore[attr-defined]
        # else the group would never form
        store.set(f"facts {rank}", json.dumps([HOST, {"--device": device.type}]))
        _refuse_differences([json.loads(store.get(f"facts {other}")) for other in range(world_size)])
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", rank=rank, world_size=world_size,
                                timeout=timeout, store=store, device_id=device if is_cuda else None)
        if is_cuda:  # NCCL fails now if it does, and takes much of its memory before what is free is looked at
            dist.all_reduce(torch.zeros(1, device=device))
            (done := torch.cuda.Event()).record()
            end = time.monotonic() + MEETING
            while not done.query():
                if time.monotonic() > end:
                    raise UserError(f"the GPUs have not reached each other in {MEETING:.0f} s{_NO_P2P}")
                time.sleep(0.05)
