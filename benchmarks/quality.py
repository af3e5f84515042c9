"""What --quantize int8 costs on a trained model, and what a token costs as the context grows.

    python benchmarks/quality.py CHECKPOINT DATA_DIR [--examples 40]

The likeliest tokens and the perplexity of val responses, read with fp32 and with int8 weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import common  # noqa: F401  (makes src/ importable)
import torch
import torch.nn.functional as F

from answering.decode_weights import OneRow, OneRowInt8, for_decoding
from data.shards import open_prepared
from dataloader_instruct import InstructData
from model import GPT, KVCache
from weights.checkpoint import load, model_of


def quality(models: dict[str, GPT], data: InstructData, examples: int) -> None:
    agreed, count, losses = 0, 0, dict.fromkeys(models, 0.0)
    for number in range(min(examples, len(data))):
        tokens, mask = (torch.from_numpy(part.astype("int64")) for part in data.example(number))
        rows, found = mask[1:] == 1, {}
        for name, model in models.items():
            found[name] = read(model, tokens)[:-1][rows]
            losses[name] += float(F.cross_entropy(found[name], tokens[1:][rows], reduction="sum"))
        agreed += int((found["fp32"].argmax(1) == found["int8"].argmax(1)).sum())
        count += int(rows.sum())
    perplexity = {name: math.exp(loss / count) for name, loss in losses.items()}
    fp32, int8 = perplexity["fp32"], perplexity["int8"]
    print(f"same likeliest token at {agreed} of {count} positions ({100 * agreed / count:.2f} %); perplexity fp32 "
          f"{fp32:.5f}, int8 {int8:.5f}, ratio {int8 / fp32:.5f}")


def read(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Scores (n_tokens, n_vocab), a token at a time as in decoding: a prompt would be read in fp32."""
    cache = KVCache(model.config)
    return torch.cat([model.logits(model.decode(token, cache)) for token in tokens.split(1)])


def growth(model: GPT, name: str) -> None:
    lengths = [model.config.context_length * part // 8 for part in (1, 2, 4, 7)]
    token, seconds = torch.tensor([5]), {length: [] for length in lengths}
    caches = {length: KVCache(model.config) for length in lengths}
    for length, cache in caches.items():
        model.decode(torch.zeros(length, dtype=torch.int64), cache)
    for _ in range(30):
        for length, cache in caches.items():
            cache.length = length
            begin = time.perf_counter()
            model.logits(model.decode(token, cache))
            seconds[length].append(time.perf_counter() - begin)
    print(f"{name}, ms a token after this many: " + ", ".join(
        f"{length} {1e3 * statistics.median(values):.2f}" for length, values in seconds.items()))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--examples", type=int, default=40)
    options = parser.parse_args()
    models = {name: model_of(load(options.checkpoint), options.checkpoint)
              for name in ("fp32", "int8")}
    for name, model in models.items():
        for_decoding(model, OneRowInt8 if name == "int8" else OneRow)
    config = models["fp32"].config
    data = InstructData(open_prepared(options.data_dir), "val", config.context_length)
    quality(models, data, options.examples)
    for name, model in models.items():
        growth(model, name)


if __name__ == "__main__":
    main()
