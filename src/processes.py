"""The processes of a run: rank and device, sums over ranks, and the signals that all ranks agree on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from cli import WATCHED_SIGNALS, UserError, decide, is_decided

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

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def largest(self, value: int) -> int:
        """The largest of all ranks' values: what one rank noticed, all know."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def fail_together(self, error: UserError | None) -> None:
        """Raise on every rank when any rank has an error: on one of them the error, on the others a silent exit."""
        errors = [error]
        if self.world_size > 1:
            errors = [None] * self.world_size
            dist.all_gather_object(errors, error)
        failed = [rank for rank, found in enumerate(errors) if found is not None]
        if failed:
            first = errors[failed[0]]
            assert first is not None
            raise first if self.is_main else SystemExit(first.exit_code)

    def close(self) -> None:
        """Leave the process group, but keep its C++ object: its destructor waits, holding the interpreter's lock, for
        gloo's threads, which may wait for that lock (a deadlock of torch 2.13 in one of twenty runs)."""
        if self.world_size > 1:
            _never_destroyed.append(dist.group.WORLD)
            dist.destroy_process_group()


def device_named(name: str) -> str:
    """auto becomes cuda or cpu. Raises UserError when the named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: no such device here; --device cpu works everywhere")
    return name


def join(device_name: str) -> Processes:
    """Find this process's rank and device from torchrun's environment, and join the process group if there is one.

    Raises UserError when the device is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device_name = device_named(device_name)
    if device_name == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > torch.cuda.device_count():  # every process of the machine notices, so none waits for another
            raise UserError(f"{here} processes for {torch.cuda.device_count()} GPUs; start fewer")
        torch.cuda.set_device(local_rank)
    device = torch.device(f"cuda:{local_rank}" if device_name == "cuda" else device_name)
    if world_size > 1:
        dist.init_process_group("nccl" if device_name == "cuda" else "gloo", timeout=timedelta(minutes=10),
                                device_id=device if device_name == "cuda" else None)
    return Processes(rank, world_size, device)


class Signals:
    """What SIGINT, SIGTERM and SIGUSR1 asked of this process. The handler sets a flag and nothing else; only a second
    SIGINT or SIGTERM, a second or more after the first, leaves at once (checkpoints on disk are whole at any time)."""

    def __init__(self) -> None:
        self.stop = 0  # the signal's number
        self.save = 0
        self._first = 0.0

    def watch(self) -> None:
        """From now on; signals that were held until now count too."""
        for number in WATCHED_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = 1
        elif is_decided():  # another rank has left; this signal is torchrun's
            os._exit(128 + number)
        elif not self.stop:
            self.stop, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= 1.0:
            decide(128 + number)
            os._exit(128 + number)
