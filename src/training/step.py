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
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataloader_instruct import InstructData, MicroBatch, Plan
from model import GPT
from training.adamw import AdamW
from training.compiled import Compiled
from training.cross_entropy import output_loss
from training.gradients import Gradients
from training.memory import most_tokens
from training.precision import Products, product_type
from training.processes import Processes

HIGHEST_SCALE = 2.0**16  # of the loss in fp16, whose small gradients would be 0 without it
SCALE_STEPS = 1000  # a scale that was lowered is doubled at multiples of this


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


class Learner:
    """A model and what trains it, on this rank of several.

    The weights, their gradients and the optimizer are in fp32; with a smaller product_type the layers multiply copies.
    """

    def __init__(self, model: GPT, options: Namespace, processes: Processes,
                 say: Callable[[str], None] = lambda text: None) -> None:
        self.model, self.processes, self.options = model, processes, options
        self.product_type = product_type(options.precision, processes.device)
        model.transformer.wte.sparse = processes.device.type == "cpu"  # its gradient has the rows of the tokens alone
        self.products = Products(model, self.product_type)
        self.computing = self.products.model
        self.hidden_of = Compiled(self.computing, say) if options.compile == "on" else self.computing
        self.n_tokens = most_tokens(options) if options.compile == "on" else 1  # of a micro-batch, at least
        self.set_loss_scale(HIGHEST_SCALE)
        self.optimizer = AdamW(model, options.weight_decay)
        self.gradients = Gradients(model, self.products.copies, processes.world_size)

    def set_loss_scale(self, scale: float) -> None:
        """What fp16 multiplies the loss by, at most HIGHEST_SCALE. Raises ValueError for one that no run has."""
        if type(scale) is not float or not scale >= 1:
            raise ValueError(f"a loss scale of {scale}")
        self.loss_scale = min(HIGHEST_SCALE, scale) if self.product_type is torch.float16 else 1.0

    def batches(self, data: InstructData, plan: Plan) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a plan, on its device. The next is put together while one is computed."""
        mine = plan.micro_batches[self.processes.rank::self.processes.world_size]
        with ThreadPoolExecutor(1) as thread:
            made = (thread.submit(data.micro_batch, examples, self.n_tokens) for examples in [*mine, []])
            for batch, _ in pairwise(made):  # one ahead; the last, which has no examples, is not taken
                yield batch.result().to(self.processes.device)

    def add_gradients(self, batch: MicroBatch, scale: float) -> Tensor:
        """Add the gradients of scale * the summed cross entropy at a micro-batch's response positions to those of the
        weights. Returns that sum, without scale."""
        weight = self.model.transformer.wte.weight
        hidden = self.hidden_of(batch.tokens, batch.documents, batch.rows)
        loss, gradient = output_loss(hidden.detach(), weight, batch.targets, self.products.output,
                                     self.gradients[weight], scale)
        assert gradient is not None and gradient.shape == hidden.shape
        # As hidden.backward(gradient), which would import sympy. Of no rows too: all weights get their gradient.
        (hidden * gradient).sum().backward()
        self.gradients.add()
        return loss

    @torch.no_grad()
    def loss(self, batch: MicroBatch) -> Tensor:
        """Sum of the cross entropy at a micro-batch's response positions, 0 where there are none."""
        hidden = self.hidden_of(batch.tokens, batch.documents, batch.rows)
        return output_loss(hidden, self.model.transformer.wte.weight, batch.targets, self.products.output)[0]

    def gradients_of(self, data: InstructData, plan: Plan, rate: float) -> StepResult:
        """Leave the gradients of a step of this learning rate in the weights, over all ranks."""
        self.gradients.begin()
        n_local, waited, begin = len(plan.micro_batches) // self.processes.world_size, 0.0, time.perf_counter()
        losses: list[Tensor] = []
        for number, batch in enumerate(self.batches(data, plan), 1):
            waited += time.perf_counter() - begin
            self.gradients.is_last = number == n_local
            losses.append(self.add_gradients(batch, self.loss_scale / plan.response_tokens))
            begin = time.perf_counter()
        total = torch.stack(losses).sum()
        if self.processes.world_size > 1:
            dist.all_reduce(total)
        gradients = self.gradients.finish(self.loss_scale)
        # row by row: in one sum over a large matrix in fp32 a CPU loses up to some hundredths
        norm = nn.utils.get_total_norm([gradient.norm(dim=-1) for gradient in gradients])
        loss, gradient_norm = torch.stack([total / plan.response_tokens, norm]).tolist()  # the one wait for a GPU
        if gradient_norm > self.options.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.options.grad_clip, norm)
        return StepResult(loss, gradient_norm, rate, waited)


def learning_rate(step: int, options: Namespace) -> float:
    """The rate of step 0, 1, ...: linear warm-up (step + 1) / warmup_steps, then half a cosine down to min_lr at
    max_steps (Loshchilov & Hutter 2017, without restarts)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return options.min_lr + cosine * (options.learning_rate - options.min_lr)


def train_step(learner: Learner, data: InstructData, plan: Plan, rate: float) -> StepResult:
    """One optimizer step on the examples of the plan. The optimizer does not move when loss or gradients are not finite
    (is_finite of the result says so). In fp16 gradients may overflow: the step is repeated with half the loss scale,
    down to 1; where that does not help, the scale stays as it was."""
    optimizer = learner.optimizer
    learner.products.refresh()
    result, scale = learner.gradients_of(data, plan, rate), learner.loss_scale
    while not result.is_finite and math.isfinite(result.loss) and learner.loss_scale > 1:
        learner.set_loss_scale(learner.loss_scale / 2)
        result = learner.gradients_of(data, plan, rate)
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    else:
        learner.set_loss_scale(scale)
    return result


@torch.no_grad()
def evaluate(learner: Learner, data: InstructData, plan: Plan,
             is_stopped: Callable[[], bool] = lambda: False) -> float | None:
    """Mean cross entropy of the plan's response tokens, in nats. Losses are summed over all ranks and divided once.
    None when it was stopped, which all ranks have to find at the same micro-batch."""
    learner.products.refresh()
    losses = []
    for batch in learner.batches(data, plan):
        if is_stopped():
            return None
        losses.append(learner.loss(batch))
    return sum(learner.processes.gather(float(torch.stack(losses).cpu().double().sum()))) / plan.response_tokens
