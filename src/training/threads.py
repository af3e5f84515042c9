"""What is done while a GPU computes steps: a checkpoint is written."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class Saver:
    """Writes one state after another. is_later: from a copy in the computer's memory, in a thread."""

    def __init__(self, is_later: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self._thread = ThreadPoolExecutor(1) if is_later else None
        self._writing: Future[None] | None = None
        self._say = say

    @property
    def has_failed(self) -> bool:
        """Whether wait() would raise at once."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def write(self, write: Callable[[Mapping[str, Any]], None], state: Mapping[str, Any]) -> None:
        """Call write with the state as it is now. Raises what it raises, or what an earlier call did in the thread;
        this state is written all the same."""
        if not self._thread:
            return write(state)
        try:
            self.wait()  # so that there is never more than one copy
        finally:
            self._writing = self._thread.submit(write, copied(state))

    def wait(self) -> None:
        """Wait until all is written. Raises what a write raised."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Wait until all is written, and say what failed."""
        try:
            self.wait()
        except Exception as error:
            self._say(f"error: {error}")


def copied(state: Any) -> Any:
    """A copy of nested tensors and values, in the computer's memory."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
