"""The arithmetic of training: the loss, one optimizer step, the schedule, evaluation.

    loss of a step = sum of cross entropy over the response tokens of the whole step / their number

where the whole step is all micro-batches of all ranks. How it is split does not enter.
"""

from __future__ import annotations

import math
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.parallel import DistributedDataParallel

from dataloader_instruct import ExampleStream, InstructData, MicroBatch, Position, deal
from model import GPT, Documents
from processes import Processes, Signals

# Rows of [rows, vocab] scores that exist at a time: 100 MB for GPT-2's vocabulary in fp32.
_CHUNK = LinearCrossEntropyOptions(batch_chunk_size=512)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 for matrix products on GPUs that have it; fp32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


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


def wrap(model: GPT, processes: Processes) -> nn.Module:
    """The loss as a module; with several processes its gradients are averaged over ranks."""
    loss = ResponseLoss(model)
    return loss if processes.world_size == 1 else DistributedDataParallel(loss, gradient_as_bucket_view=True)


def make_optimizer(model: GPT, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.95), with decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=matrices[0].device.type in ("cuda", "cpu"))


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
    tokens: int
    response_tokens: int
    examples: list[int]
    after: Position

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_step(loss_of: nn.Module, optimizer: torch.optim.Optimizer, data: InstructData, stream: ExampleStream,
               position: Position, step: int, options: Namespace, processes: Processes) -> StepResult:
    """One optimizer step on the examples at position. The optimizer does not move when loss or gradients are not
    finite (is_finite of the result says so)."""
    examples, after = stream.step(position)
    response_tokens = data.response_tokens(examples)  # of the whole step: every rank knows it before it computes
    hands = deal(examples, data.lengths, options.mini_batch_size * options.context_length, processes.world_size)
    local_hands = hands[processes.rank::processes.world_size]
    scale = processes.world_size / response_tokens  # DDP averages over ranks; the step's gradient is their sum
    local_loss: float | Tensor = 0.0
    optimizer.zero_grad()
    for number, hand in enumerate(local_hands, 1):
        synced = number == len(local_hands) or not isinstance(loss_of, DistributedDataParallel)
        with nullcontext() if synced else loss_of.no_sync():  # type: ignore[union-attr, operator]
            loss = loss_of(data.micro_batch(hand)) * scale
            loss.backward()
        local_loss = local_loss + loss.detach() / processes.world_size
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rate = learning_rate(step, options)
    gradient_norm = float(nn.utils.clip_grad_norm_(parameters, options.grad_clip))
    [global_loss] = processes.sum([float(local_loss)])
    tokens = int(data.lengths[examples].sum())
    result = StepResult(global_loss, gradient_norm, rate, tokens, response_tokens, examples, after)
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return result


@torch.no_grad()
def evaluate(loss_of: nn.Module, data: InstructData, options: Namespace, processes: Processes,
             signals: Signals | None = None) -> float | None:
    """Mean cross entropy of the val split's response tokens (or of its first eval_examples), in nats.

    Loss and count are summed over all ranks and divided once. None when a signal cut it short.
    """
    raw = loss_of.module if isinstance(loss_of, DistributedDataParallel) else loss_of
    examples = range(min(options.eval_examples or len(data), len(data)))
    hands = deal(examples, data.lengths, options.mini_batch_size * options.context_length, processes.world_size)
    local_loss, local_count = 0.0, 0
    for hand in hands[processes.rank::processes.world_size]:
        if signals and processes.largest(signals.stop):
            return None
        batch = data.micro_batch(hand)
        local_loss += float(raw(batch))
        local_count += len(batch.targets)
    loss, count = processes.sum([local_loss, local_count])
    return loss / count
