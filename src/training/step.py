"""The arithmetic of training: the loss, one optimizer step, the schedule, evaluation.

    loss of a step = sum of cross entropy over the response tokens of the whole step / their number

where the whole step is all micro-batches of all ranks. How it is split does not enter.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataloader_instruct import InstructData, MicroBatch, Plan
from model import GPT
from training.compiled import Compiled
from training.cross_entropy import output_loss
from training.precision import LowPrecision, product_type
from training.processes import Processes

HIGHEST_SCALE = 2.0**16  # of the loss in fp16, whose small gradients would be 0 without it
GROUP = 12  # gradients are added so many at a time: those of a layer
SCALE_STEPS = 1000  # after so many steps a scale that was lowered is doubled


class Learner:
    """A model and what trains it, on this rank of several.

    The weights and their gradients are in fp32; with a smaller product_type the layers multiply copies. A parameter's
    gradient is summed over the ranks as soon as the last micro-batch has added to it, while the rest is computed.
    """

    def __init__(self, model: GPT, options: Namespace, processes: Processes,
                 say: Callable[[str], None] = lambda text: None) -> None:
        """AdamW, betas (0.9, 0.95), with decay on matrices only."""
        self.model, self.processes, self.options = model, processes, options
        self.product_type = product_type(options.precision, processes.device)
        self.low = None if self.product_type is torch.float32 else LowPrecision(model, self.product_type)
        self.computing = self.low.model if self.low else model
        self.hidden_of = Compiled(self.computing, say) if options.compile == "on" else self.computing
        self.n_tokens = most_tokens(options) if options.compile == "on" else 1  # of a micro-batch, at least
        self.output = self.low.output if self.low else None
        self.set_loss_scale(HIGHEST_SCALE)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=processes.device.type in ("cuda", "cpu"))
        self.gradients: dict[nn.Parameter, Tensor] = {}  # of the step, as far as it is
        self._found: list[tuple[nn.Parameter, Tensor]] = []  # gradients of a micro-batch that are not added yet
        self._is_last, self._sums = False, list[dist.Work]()
        copies = {id(parameter): copy for parameter, copy in self.low.copies} if self.low else {}
        for parameter in model.parameters():
            copies.get(id(parameter), parameter).register_post_accumulate_grad_hook(self._collector(parameter))

    def set_loss_scale(self, scale: float) -> None:
        """What fp16 multiplies the loss by. Raises ValueError for one that no run has."""
        if type(scale) is not float or not 1 <= scale <= HIGHEST_SCALE:
            raise ValueError(f"a loss scale of {scale}")
        self.loss_scale = scale if self.product_type is torch.float16 else 1.0

    def _collector(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def collect(copy: Tensor) -> None:
            assert copy.grad is not None
            self._found.append((parameter, copy.grad))
            copy.grad = None
            if len(self._found) == GROUP:
                self._add_found()

        return collect

    @torch.no_grad()
    def _add_found(self) -> None:
        """Add what a micro-batch found to the step's gradients, many at once; sum what is complete over the ranks."""
        found, self._found = dict(self._found), []
        small = [parameter for parameter, gradient in found.items() if gradient.dtype != parameter.dtype]
        if small:
            wide = [torch.empty_like(parameter) for parameter in small]
            torch._foreach_copy_(wide, [found[parameter] for parameter in small])
            found.update(zip(small, wide))
        known = [parameter for parameter in found if parameter in self.gradients]
        if known:
            torch._foreach_add_([self.gradients[parameter] for parameter in known],
                                [found[parameter] for parameter in known])
        self.gradients = {**found, **self.gradients}
        if self._is_last and self.processes.world_size > 1:
            self._sums += [dist.all_reduce(self.gradients[parameter], async_op=True) for parameter in found]

    def batches(self, data: InstructData, plan: Plan) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a plan, on its device. The next is put together while one is computed."""
        mine = plan.micro_batches[self.processes.rank::self.processes.world_size]
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(data.micro_batch, mine[0], self.n_tokens)
            for number in range(1, len(mine) + 1):
                batch = coming.result()
                if number < len(mine):
                    coming = thread.submit(data.micro_batch, mine[number], self.n_tokens)
                yield batch.to(self.processes.device)

    def add_gradients(self, batch: MicroBatch, scale: float) -> Tensor:
        """Add the gradients of scale * the summed cross entropy at a micro-batch's response positions to those of the
        weights. Returns that sum, without scale."""
        weight = self.model.transformer.wte.weight
        if weight not in self.gradients:
            self.gradients[weight] = torch.zeros_like(weight)
        hidden = self.hidden_of(batch.tokens, batch.documents, batch.rows)
        loss, gradient = output_loss(hidden.detach(), weight, batch.targets, self.output,
                                     self.gradients[weight], scale)
        hidden.backward(gradient)  # of no rows too: then every parameter gets its gradient of 0
        self._add_found()
        return loss

    @torch.no_grad()
    def loss(self, batch: MicroBatch) -> Tensor:
        """Sum of the cross entropy at a micro-batch's response positions, 0 where there are none."""
        hidden = self.hidden_of(batch.tokens, batch.documents, batch.rows)
        return output_loss(hidden, self.model.transformer.wte.weight, batch.targets, self.output)[0]

    def gradients_of(self, data: InstructData, plan: Plan) -> tuple[float, float, float]:
        """Leave the gradients of a step in the weights, over all ranks. Returns loss, gradient norm and seconds that
        this rank waited for its micro-batches."""
        self.optimizer.zero_grad()
        self.gradients.clear()
        n_local, waited, begin = len(plan.micro_batches) // self.processes.world_size, 0.0, time.perf_counter()
        losses: list[Tensor] = []
        for number, batch in enumerate(self.batches(data, plan), 1):
            waited += time.perf_counter() - begin
            self._is_last = number == n_local
            losses.append(self.add_gradients(batch, self.loss_scale / plan.response_tokens))
            begin = time.perf_counter()
        total = torch.stack(losses).sum()
        if self.processes.world_size > 1:
            dist.all_reduce(total)
        for work in self._sums:
            work.wait()
        self._sums.clear()
        if self.loss_scale != 1:
            torch._foreach_mul_(list(self.gradients.values()), 1 / self.loss_scale)
        for parameter, found in self.gradients.items():
            parameter.grad = found
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        # the step's one wait for a GPU
        loss, gradient_norm = torch.stack([total / plan.response_tokens, norm]).tolist()
        return loss, gradient_norm, waited


def most_tokens(options: Namespace) -> int:
    """How many tokens a micro-batch may have."""
    return min(options.mini_batch_size * options.context_length, options.total_batch_size)  # type: ignore[no-any-return]


def learning_rate(step: int, options: Namespace) -> float:
    """The rate of step 0, 1, ...: linear warm-up (step + 1) / warmup_steps, then half a cosine down to min_lr at
    max_steps (Loshchilov & Hutter 2017, without restarts)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return options.min_lr + cosine * (options.learning_rate - options.min_lr)


@dataclass(frozen=True)
class StepResult:
    """One step's figures, over all ranks."""

    loss: float  # nats a response token
    gradient_norm: float  # before clipping
    learning_rate: float
    data_wait: float = 0.0  # seconds that this rank waited for its micro-batches

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_step(learner: Learner, data: InstructData, plan: Plan, rate: float) -> StepResult:
    """One optimizer step on the examples of the plan. The optimizer does not move when loss or gradients are not finite
    (is_finite of the result says so). In fp16 that may be an overflow: the step is repeated with half the loss scale,
    down to 1."""
    optimizer = learner.optimizer
    if learner.low:
        learner.low.refresh()
    while True:
        loss, gradient_norm, data_wait = learner.gradients_of(data, plan)
        result = StepResult(loss, gradient_norm, rate, data_wait)
        if result.is_finite or learner.loss_scale <= 1:
            break
        learner.loss_scale /= 2
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return result


@torch.no_grad()
def evaluate(learner: Learner, data: InstructData, plan: Plan,
             is_stopped: Callable[[], bool] = lambda: False) -> float | None:
    """Mean cross entropy of the plan's response tokens, in nats. Losses are summed over all ranks and divided once.
    None when it was stopped, which all ranks have to find at the same micro-batch."""
    if learner.low:
        learner.low.refresh()
    losses = []
    for batch in learner.batches(data, plan):
        if is_stopped():
            return None
        losses.append(learner.loss(batch))
    [loss] = learner.processes.sum([float(torch.stack(losses).cpu().double().sum())])
    return loss / plan.response_tokens
