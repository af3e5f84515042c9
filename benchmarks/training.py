"""Training speed and memory against TRL, and against the bare matrix products: GPT-2 124M on the CPU.

    python benchmarks/training.py --dataset FILE [--rounds 5] [--threads N] [--peers products,trl_grouped_bf16,...]

Each round is one optimizer step of ours (2,048 tokens) and one of the peer's, in turn, on random weights, in fp32, or
both in bf16 where the name ends so. ours against ours_bf16 shows what --precision bf16 gains.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import clock, compare, report, serve
from hf_tokenizer import as_hugging_face

if TYPE_CHECKING:
    import torch

CONTEXT, MICRO_BATCH = 1024, 2
PEERS = {"products": "ours", "trl_default": "ours", "trl_packed": "ours", "trl_grouped": "ours", "ours": "ours_bf16",
         "products_bf16": "ours_bf16", "trl_packed_bf16": "ours_bf16", "trl_grouped_bf16": "ours_bf16"}


def prepare(dataset: Path, folder: Path) -> None:
    """Shards for ours, prompt/completion pairs for TRL: the same kept examples."""
    import prepare_instruct_dataset
    from instruct_format import prompt_text

    prepare_instruct_dataset.main(["--dataset", str(dataset), "--output_dir", str(folder / "data")])
    rows = json.loads(dataset.read_text())
    pairs = [{"prompt": prompt_text(row["instruction"], row["input"]), "completion": row["output"] + "<|endoftext|>"}
             for row in rows if row["output"].strip()]
    (folder / "pairs.json").write_text(json.dumps(pairs))


def ours(folder: Path, precision: str) -> None:
    import torch

    from data.shards import open_prepared
    from dataloader_instruct import ExampleStream, InstructData, Position
    from model import GPT, GPTConfig
    from training.options import parse_options
    from training.processes import Processes
    from training.step import Learner, learning_rate, train_step

    options = parse_options(["--total_batch_size", str(MICRO_BATCH * CONTEXT), "--precision", precision])
    model = GPT(GPTConfig())
    model.init_weights(0)
    data = InstructData(open_prepared(folder / "data"), "train", CONTEXT)
    stream = ExampleStream(data.lengths, options.seed, options.total_batch_size)
    learner = Learner(model, options, Processes(0, 1, torch.device("cpu")))
    position, step = Position(), 0

    def work() -> float:
        nonlocal position, step
        examples, position = stream.step(position)
        plan = data.plan(examples, MICRO_BATCH * CONTEXT, world_size=1)
        train_step(learner, data, plan, learning_rate(step, options))
        step += 1
        return plan.response_tokens

    serve(work)


def fastest_form(a: torch.Tensor, b: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """Of three ways to compute a @ b the fastest for these."""
    import torch

    from processor import linear_by_onednn

    def by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_by_onednn(a, b.t())

    def in_pieces(a: torch.Tensor, b: torch.Tensor) -> None:
        """Into rows of a length that is a multiple of 64."""
        result = a.new_empty(len(a), b.size(1) + -b.size(1) % 64)[:, :b.size(1)]
        for columns, part in zip(b.split(2048, 1), result.split(2048, 1)):
            torch.mm(a, columns, out=part)

    def seconds(form: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
        return min(timeit.repeat(lambda: form(a, b), number=1, repeat=4))

    return min((torch.mm, by_onednn, in_pieces), key=seconds)


def products(folder: Path, precision: str) -> None:
    """The matrix products of ours' steps alone: the same shapes forward and backward, nothing else, each in the fastest
    of several forms."""
    import torch

    from data.shards import open_prepared
    from dataloader_instruct import ExampleStream, InstructData, Position

    data = InstructData(open_prepared(folder / "data"), "train", CONTEXT)
    stream = ExampleStream(data.lengths, 1337, MICRO_BATCH * CONTEXT)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = {"c_attn": (768, 2304), "attn.c_proj": (768, 768), "c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
    weights = {name: torch.randn(size[1], size[0], dtype=dtype) for name, size in sizes.items()}
    embedding = torch.randn(50257, 768, dtype=dtype)
    position = Position()
    forms: dict[tuple[str, torch.Size], Callable[[torch.Tensor, torch.Tensor], object]] = {}

    def product(rows: int, weight: torch.Tensor) -> None:
        """x W', then dx = dy W and dW = dy' x."""
        x, dy = (torch.full((rows, size), 0.1, dtype=dtype) for size in (weight.shape[1], weight.shape[0]))
        for kind, a, b in (("forward", x, weight.t()), ("input", dy, weight), ("weight", dy.t(), x)):
            if (kind, weight.shape) not in forms:  # in the first round, which is not counted
                forms[kind, weight.shape] = fastest_form(a, b)
            forms[kind, weight.shape](a, b)

    def work() -> float:
        nonlocal position
        examples, position = stream.step(position)
        plan = data.plan(examples, MICRO_BATCH * CONTEXT, world_size=1)
        tokens, responses = plan.tokens, plan.response_tokens
        for layer in range(12):
            for name, weight in weights.items():
                product(tokens if layer < 11 or name == "c_attn" else responses, weight)
        for begin in range(0, responses, 512):
            product(min(512, responses - begin), embedding)
        return responses

    serve(work)


def trl(folder: Path, setting: str, precision: str) -> None:
    """SFTTrainer, stopped after every optimizer step until the parent asks for the next one."""
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    common = {"output_dir": str(folder / setting), "max_length": CONTEXT, "max_steps": 10_000, "use_cpu": True,
              "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
              "bf16": precision == "bf16", "gradient_checkpointing": False}
    settings = {"trl_default": {"per_device_train_batch_size": 8},
                "trl_packed": {"per_device_train_batch_size": 1, "packing": True},
                "trl_grouped": {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"}}
    dropout = {} if setting == "trl_default" else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**dropout))

    class Counting(SFTTrainer):
        units = 0

        def compute_loss(self, model, inputs, *arguments, **keywords):  # type: ignore[no-untyped-def]
            self.units += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *arguments, **keywords)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            if not sys.stdin.readline():
                os._exit(0)
            self.before, self.begin = trainer.units, clock()()

        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            report(trainer.units - self.before, clock()() - self.begin)

    trainer = Counting(model=model, args=SFTConfig(**common, **settings[setting]), processing_class=as_hugging_face(),
                       train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
                       callbacks=[Turns()])
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1: measured in seconds of the processor")
    parser.add_argument("--dataset", type=Path, help="Alpaca-style JSON")
    parser.add_argument("--peers", default=",".join(PEERS))
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker[0].removesuffix("_bf16"), Path(options.worker[1])
        precision = "bf16" if options.worker[0].endswith("_bf16") else "fp32"
        if name.startswith("trl"):
            trl(folder, name, precision)
        else:
            {"ours": ours, "products": products}[name](folder, precision)
        return
    if options.dataset is None:
        parser.error("--dataset is needed")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(options.dataset, Path(temporary))
        compare(__file__, temporary, {peer: PEERS[peer] for peer in options.peers.split(",")}, "response tokens/s",
                options.threads, options.rounds)


if __name__ == "__main__":
    main()
