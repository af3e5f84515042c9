"""Training steps on however many processes there are; rank 0 saves losses, examples, gradients and weights.

    steps_worker.py DATA OUTPUT MINI_BATCH_SIZE...      twenty steps in float32, three in float64 and five in
                                                       bf16, for each size, on the device named in STEPS_DEVICE
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from cli import run
from dataloader_instruct import ExampleStream, Position
from helpers import open_data
from models import options_of, small_model
from training.ending import leave
from training.processes import Processes, join
from training.step import Learner, evaluate, learning_rate, train_step

STEPS = {"float32": 20, "float64": 3, "bf16": 5}


def take_steps(data_dir: Path, mini_batch_size: str, dtype: str, processes: Processes) -> dict[str, Any]:
    options = options_of("--mini_batch_size", mini_batch_size, "--total_batch_size", 2048, "--context_length", 512,
                         "--learning_rate", 1e-3, "--warmup_steps", 5, "--max_steps", 20, "--grad_clip", 0.5,
                         "--precision", "bf16" if dtype == "bf16" else "fp32")
    data = open_data(data_dir, options.context_length)
    model = small_model().to(processes.device, torch.float64 if dtype == "float64" else torch.float32)
    learner = Learner(model, options, processes)
    stream = ExampleStream(data["train"].lengths, options.seed, options.total_batch_size)
    most_tokens = options.mini_batch_size * options.context_length
    position, results, gradients = Position(), [], {}
    for step in range(STEPS[dtype]):
        examples, position = stream.step(position)
        plan = data["train"].plan(examples, most_tokens, processes.world_size)
        result = train_step(learner, data["train"], plan, learning_rate(step, options))
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append([result.loss, result.gradient_norm, examples])
    plan = data["val"].plan(range(len(data["val"])), most_tokens, processes.world_size)
    return {"results": results, "gradients": gradients, "model": model.state_dict(),
            "val_loss": evaluate(learner, data["val"], plan)}


def main(data_dir: str, output: str, *mini_batch_sizes: str) -> int:
    processes = join(os.environ.get("STEPS_DEVICE", "cpu"))
    has_bf16 = processes.device.type == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    found = {(size, dtype): take_steps(Path(data_dir), size, dtype, processes)
             for size in mini_batch_sizes for dtype in STEPS if dtype != "bf16" or has_bf16}
    if processes.is_main:
        torch.save(found, output)
    processes.close()
    return 0


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]), leave)
