"""The gradients of a step: summed over its micro-batches and over the ranks, in the type of the weights."""

from collections.abc import Mapping
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import GPT

GROUP = 12  # they are added so many at a time, which are those of a layer


class Gradients:
    """What the backward passes find goes here, not to .grad, where finish() puts the whole step's.

    A rank's sum of a parameter goes to the other ranks as soon as is_last is set and a backward pass has added to it,
    while the rest of that pass is computed. copies: a parameter of the model -> the one in its place in the passes.
    """

    def __init__(self, model: GPT, copies: Mapping[nn.Parameter, nn.Parameter], world_size: int) -> None:
        self.is_last = False  # whether this is the last micro-batch of the step
        self._world_size = world_size
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._found: list[tuple[nn.Parameter, Tensor]] = []  # by this pass, and not added yet
        self._to_send, self._complete = list[nn.Parameter](), set[nn.Parameter]()
        self._sent = list[dist.Work]()
        self._stands_for: dict[Tensor, nn.Parameter] = {copies.get(each, each): each for each in model.parameters()}
        here = ref(self)  # a parameter has its hooks where Python's collector does not look

        def collect(computed: Tensor) -> None:
            if (gradients := here()) is not None:
                gradients._collect(computed)

        for computed in self._stands_for:
            computed.register_post_accumulate_grad_hook(collect)

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """The sum of a parameter until now, which may be added to before the backward pass."""
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter)
        return self._sums[parameter]

    def begin(self) -> None:
        """Forget those of the step before."""
        self._sums.clear()
        self._complete.clear()
        # sent in this order on all ranks, whatever the order in which they are found; nearly that of a backward pass
        self._to_send = list(self._stands_for.values())
        for parameter in self._to_send:
            parameter.grad = None

    def finish(self, scale: float) -> list[Tensor]:
        """Wait for the other ranks, divide by scale, and leave the gradients in .grad. Returns them too."""
        for work in self._sent:
            work.wait()
        self._sent.clear()
        gradients = [self[parameter] for parameter in self._stands_for.values()]
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        for parameter, gradient in self._sums.items():
            parameter.grad = gradient
        return gradients

    def _collect(self, computed: Tensor) -> None:
        assert computed.grad is not None
        self._found.append((self._stands_for[computed], computed.grad))
        computed.grad = None
        if len(self._found) == GROUP:
            self.add()

    @torch.no_grad()
    def add(self) -> None:
        """Add what was found and not added yet; for the end of a backward pass."""
        found, self._found = dict(self._found), []
        small = [parameter for parameter, gradient in found.items() if gradient.dtype != parameter.dtype]
        if small:
            wide = [torch.empty_like(parameter) for parameter in small]
            torch._foreach_copy_(wide, [found[parameter] for parameter in small])
            found.update(zip(small, wide))
        known = [parameter for parameter in found if parameter in self._sums]
        if known:
            torch._foreach_add_([self._sums[parameter] for parameter in known],
                                [found[parameter] for parameter in known])
        self._sums = {**found, **self._sums}
        if self.is_last and self._world_size > 1:
            self._complete |= found.keys()
            while self._to_send and self._to_send[-1] in self._complete:
                self._sent.append(dist.all_reduce(self._sums[self._to_send.pop()], async_op=True))
