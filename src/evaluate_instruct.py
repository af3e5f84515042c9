"""How good a checkpoint is: its greedy answers to a prepared split, against the expected ones.

    python src/evaluate_instruct.py --checkpoint checkpoints_instruct/best_model.pt
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from cli import Parser, number, printable_line, run


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Share of a prepared split whose expected answer the model gives exactly (greedy decoding).")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints_instruct/best_model.pt"),
                        help="default: %(default)s")
    parser.add_argument("--data_dir", type=Path, default=Path("data_instruct"), help="default: %(default)s")
    parser.add_argument("--split", default="val", choices=("train", "val"), help="default: %(default)s")
    parser.add_argument("--examples", type=number(int, 0), default=0, help="the first N; 0 means all (default: 0)")
    parser.add_argument("--show", type=number(int, 0), default=8, help="answers to print (default: %(default)s)")
    return parser.parse_args(argv)


def scored_answers(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, expected answer, the model's answer) for each example. The model may take as many tokens as the
    expected answer has, and one to end."""
    import torch

    from answering.generate import generate
    from data.shards import open_prepared
    from dataloader_instruct import InstructData
    from instruct_format import END_OF_TEXT, tokenizer, trained_spans
    from weights.checkpoint import load, model_of

    model = model_of(load(options.checkpoint), options.checkpoint, torch.device("cpu"))
    data = InstructData(open_prepared(options.data_dir), options.split, model.config.context_length,
                        model.config.vocab_size)
    for index in range(min(options.examples or len(data), len(data))):
        document = data.example(index)
        tokens, (start, end) = document.tokens.tolist(), trained_spans(document.loss_mask)[0]
        answer = list(generate(model, tokens[:start], end - start, stop_token=END_OF_TEXT))
        decode = tokenizer().decode
        yield decode(tokens[:start]), decode(tokens[start:end - 1]), decode(answer)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    results = list(scored_answers(options))
    exact = sum(answer == expected for _, expected, answer in results)
    n_shown = min(options.show, len(results))
    for prompt, expected, answer in (results[index * len(results) // n_shown] for index in range(n_shown)):
        question = prompt.split("### Response:")[0].replace("### Instruction:", "").replace("### Input:", "|")
        mark = "exact" if answer == expected else f"expected {expected}"
        print(printable_line(f"{' '.join(question.split())} -> {answer} ({mark})"))
    print(f"exact answers: {exact} of {len(results)} ({100 * exact / len(results):.1f} %)")
    return 0


if __name__ == "__main__":
    run(main)
