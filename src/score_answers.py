"""Score greedy answers to a prepared split against the expected ones.

    python src/score_answers.py --checkpoint checkpoints_instruct/best_model.pt
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cli import Parser, UserError, number, printable_line, run


class Scored(NamedTuple):
    question: str
    expected: str
    answer: str

    @property
    def is_exact(self) -> bool:
        return self.answer == self.expected


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Share of a prepared split whose expected answer the model gives exactly (greedy decoding).")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints_instruct/best_model.pt"),
                        help="default: %(default)s")
    parser.add_argument("--data_dir", type=Path, default=Path("data_instruct"), help="default: %(default)s")
    parser.add_argument("--split", default="val", choices=("train", "val"), help="default: %(default)s")
    parser.add_argument("--examples", type=number(int, 0), default=0, help="the first N; 0 means all (default: 0)")
    parser.add_argument("--show", type=number(int, 0), default=8, help="answers to print (default: %(default)s)")
    return parser.parse_args(argv)


def scored_answers(options: Namespace) -> Iterator[Scored]:
    """Answer each example's prompt, with as many tokens as the expected answer has, and one to end."""
    import torch

    from checkpoint import load, model_of
    from dataloader_instruct import InstructData
    from generate import generate
    from instruct_format import END_OF_TEXT, tokenizer

    model = model_of(load(options.checkpoint), options.checkpoint, torch.device("cpu"))
    data = InstructData(options.data_dir, options.split, model.config.context_length, model.config.vocab_size)
    for index in range(min(options.examples or len(data), len(data))):
        tokens, mask = (part.tolist() for part in data.example(index))
        prompt_length = mask.index(1)
        expected = tokens[prompt_length:]
        answer = list(generate(model, tokens[:prompt_length], len(expected), stop_token=END_OF_TEXT))
        question = tokenizer().decode(tokens[:prompt_length])
        yield Scored(question, tokenizer().decode(expected[:-1]), tokenizer().decode(answer))


def spread(items: list[Scored], count: int) -> list[Scored]:
    """Count of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if not options.checkpoint.exists():
        raise UserError(f"{options.checkpoint}: no such checkpoint; fine-tune first")
    results = list(scored_answers(options))
    exact = sum(result.is_exact for result in results)
    for result in spread(results, options.show):
        question = result.question.split("### Response:")[0].replace("### Instruction:", "").replace("### Input:", "|")
        mark = "exact" if result.is_exact else f"expected {result.expected}"
        print(printable_line(f"{' '.join(question.split())} -> {result.answer} ({mark})"))
    print(f"exact answers: {exact} of {len(results)} ({100 * exact / len(results):.1f} %)")
    return 0


if __name__ == "__main__":
    run(main)
