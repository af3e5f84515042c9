"""The arithmetic of training: the loss, one optimizer step, the schedule, evaluation.

    loss of a step = sum of cross entropy over the response tokens of the whole step / their number

where the whole step is all micro-batches of all ranks. How it is split does not enter.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.parallel import DistributedDataParallel

from dataloader_instruct import InstructData, MicroBatch, Plan
from model import GPT, Documents
from training.precision import autocast
from training.processes import Processes

# Rows of (rows, vocab_size) scores that exist at a time: 100 MB for GPT-2's vocabulary in fp32.
_CHUNK = LinearCrossEntropyOptions(batch_chunk_size=512)


class ResponseLoss(nn.Module):
    """Sum of the cross entropy at a micro-batch's response positions: what DDP wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        """A scalar, 0 for a micro-batch without a response token."""
        weight = self.model.transformer.wte.weight
        documents = Documents.of(batch.lengths, weight.device)
        tokens, rows, targets = (x.to(weight.device, non_blocking=True)
                                 for x in (batch.tokens, batch.rows, batch.targets))
        with autocast(weight.device):
            hidden = self.model(tokens, documents, rows)
            if not len(targets):
                return hidden.sum()  # of no elements: 0, and every parameter gets its gradient of 0
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
            return F.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, reduction="sum",
                                          options=_CHUNK).to(weight.dtype)


@dataclass(frozen=True)
class Learner:
    """A model and what trains it, on this rank of several."""

    model: GPT
    loss: nn.Module  # ResponseLoss; with several processes wrapped by DDP, which averages its gradients over ranks
    optimizer: torch.optim.AdamW
    processes: Processes
    grad_clip: float

    @staticmethod
    def of(model: GPT, options: Namespace, processes: Processes) -> "Learner":
        """AdamW, betas (0.9, 0.95), with decay on matrices only."""
        loss: nn.Module = ResponseLoss(model)
        if processes.world_size > 1:
            loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=matrices[0].device.type in ("cuda", "cpu"))
        return Learner(model, loss, optimizer, processes, options.grad_clip)

    def local_batches(self, data: InstructData, plan: Plan) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a plan."""
        return map(data.micro_batch, plan.micro_batches[self.processes.rank::self.processes.world_size])


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
    (is_finite of the result says so)."""
    world_size, optimizer = learner.processes.world_size, learner.optimizer
    n_local = len(plan.micro_batches) // world_size
    scale = world_size / plan.response_tokens  # DDP averages over ranks; the step's gradient is their sum
    local_loss: float | Tensor = 0.0
    # forward and backward: the ranks exchange their gradients with the last micro-batch
    optimizer.zero_grad()
    data_wait, begin = 0.0, time.perf_counter()
    for number, batch in enumerate(learner.local_batches(data, plan), 1):
        data_wait += time.perf_counter() - begin
        with learner.loss.no_sync() if number < n_local and world_size > 1 else nullcontext():  # type: ignore[operator]
            loss = learner.loss(batch) * scale
            loss.backward()
        local_loss = local_loss + loss.detach() / world_size
        begin = time.perf_counter()
    # clip, check, update
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = float(nn.utils.clip_grad_norm_(parameters, learner.grad_clip))
    [global_loss] = learner.processes.sum([float(local_loss)])
    result = StepResult(global_loss, gradient_norm, rate, data_wait)
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return result


@torch.no_grad()
def evaluate(learner: Learner, data: InstructData, plan: Plan,
             is_stopped: Callable[[], bool] = lambda: False) -> float | None:
    """Mean cross entropy of the plan's response tokens, in nats. Loss and count are summed over all ranks and divided
    once. None when it was stopped, which all ranks have to find at the same micro-batch."""
    local_loss, local_count = 0.0, 0
    loss_of = getattr(learner.loss, "module", learner.loss)  # DDP's forward would look for gradients
    for batch in learner.local_batches(data, plan):
        if is_stopped():
            return None
        local_loss += float(loss_of(batch))
        local_count += len(batch.targets)
    loss, count = learner.processes.sum([local_loss, local_count])
    return loss / count
