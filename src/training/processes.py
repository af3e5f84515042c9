"""The processes of a run: rank and device, sums over ranks, and errors that all ranks share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError
from training.precision import device_named

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
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def largest(self, *values: int) -> list[int]:
        """The largest of all ranks' values, one by one: what one rank noticed, all know."""
        return self._reduced(values, torch.int64, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], dtype: torch.dtype, how: dist.ReduceOp.RedOpType) -> list[Any]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all ranks at the end of the block. When it failed on any of them it fails on all: on rank 0 with the
        first rank's UserError, on the others with SystemExit and the error's exit code."""
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        errors = [error] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found if self.is_main else SystemExit(found.exit_code)

    def close(self) -> None:
        """Leave the process group, but keep its C++ object: its destructor waits, holding the interpreter's lock, for
        gloo's threads, which may wait for that lock (a deadlock of torch 2.13 in one of twenty runs)."""
        if self.world_size > 1:
            _never_destroyed.append(dist.group.WORLD)
            dist.destroy_process_group()


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
