"""What is done while a step is computed: the next micro-batch is put together, and on a GPU a checkpoint is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(make: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """make of each item, one ahead of what is taken."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(make, item) for item in items[:1]]
        for following in [*items[1:], None]:
            made = coming.pop().result()
            if following is not None:
                coming.append(thread.submit(make, following))
            yield made


class Saver:
    """Writes one state after another. is_later: from a copy in the computer's memory, in a thread."""

    def __init__(self, is_later: bool) -> None:
        self._thread = ThreadPoolExecutor(1) if is_later else None
        self._writing: list[Future[None]] = []

    def write(self, write: Callable[[Mapping[str, Any]], None], state: Mapping[str, Any]) -> None:
        """Call write with the state as it is now. Raises what it raises, or what an earlier call did in the thread."""
        if not self._thread:
            return write(state)
        self.wait()  # so that there is never more than one copy
        self._writing.append(self._thread.submit(write, copied(state)))

    def wait(self) -> None:
        """Wait until all is written. Raises what a write raised."""
        while self._writing:
            self._writing.pop(0).result()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tensors and values, with the tensors in memory that a GPU copies to without waiting for each."""
    devices = set[torch.device]()

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            devices.add(value.device)
            room = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return room.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, Mapping):
            return {key: copy(each) for key, each in value.items()}
        return [copy(each) for each in value] if isinstance(value, (list, tuple)) else value

    found = {key: copy(value) for key, value in state.items()}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return found
