"""How good checkpoints are, side by side: loss, perplexity, what their greedy answers are like, and the answers.

    python src/evaluate_instruct.py checkpoints/best_model.pt checkpoints_instruct/best_model.pt

All get the same prompts in the same template, a model that was only pre-trained too. Everything is verified before
anything is computed.
"""

import json
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import Parser, number, printable, printable_line, run
from errors import CheckpointError, UserError, errors_at

if TYPE_CHECKING:
    from answering.scores import Case
    from model import GPTConfig

DEFAULT = (Path("checkpoints/best_model.pt"), Path("checkpoints_instruct/best_model.pt"))
SCORES = {"loss": "{:.4f}", "perplexity": "{:,.2f}", "ended": "{:.1%}", "tokens": "{:.1f}", "repeated": "{:.1%}",
          "exact": "{:.1%}"}  # how each is written


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Compare checkpoints: loss, perplexity, and what their greedy answers are like.",
                    epilog="ended: share of the answers that end by themselves; tokens: their mean length; repeated: "
                           "share of repeated 4-grams; exact: share of the answers that are the expected one")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="*",
                        help="checkpoints, or pre-trained models (files or folders); default: "
                             + " and ".join(map(str, DEFAULT)) + ", as far as they are there")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data_dir", type=Path, default=Path("data_instruct"),
                        help="prepared data (default: %(default)s)")
    source.add_argument("--dataset", help="examples of a file instead, in any form that the preparation takes")
    source.add_argument("--prompts", type=Path, help="questions of a text file instead, a line each: no loss then")
    parser.add_argument("--split", default="val", choices=("train", "val"),
                        help="of the prepared data (default: %(default)s)")
    parser.add_argument("--examples", type=number(int, 0), default=64,
                        help="this many, spread over all; 0 means all (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=256,
                        help="longest answer (default: %(default)s)")
    parser.add_argument("--show", type=number(int, 0), default=4, help="answers to show (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object, with all answers")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser.parse_args(argv)


def open_checkpoint(path: Path) -> "tuple[dict[str, Any], GPTConfig]":
    """A checkpoint or pre-trained model, verified. Raises UserError or CheckpointError when it is missing, damaged, of
    another template, or of another tokenizer."""
    import torch

    from answering.opened import verified_model
    from weights.pretrained import open_any

    state = open_any(path)
    return state, verified_model(state, path, torch.device("cpu")).config


def read_cases(options: Namespace, context_length: int) -> "tuple[list[Case], int]":
    """What is to be scored, and how many examples were left out because they are too long. Raises UserError where the
    source is missing or broken."""
    from answering.scores import Case
    from instruct_format import trained_spans

    left_out = 0
    if options.prompts:
        cases = [Case(tokens, []) for tokens in _prompts(options.prompts, context_length)]
    else:
        documents, left_out = (_dataset(options.dataset, context_length) if options.dataset else
                               _prepared(options, context_length))
        cases = [Case(list(map(int, tokens)), spans) for tokens, mask in documents if (spans := trained_spans(mask))]
    if not cases:
        raise UserError(f"{options.prompts or options.dataset or options.data_dir}: nothing to evaluate that fits a "
                        f"context of {context_length}")
    return [cases[index] for index in _spread(len(cases), options.examples or len(cases))], left_out


def _spread(count: int, wanted: int) -> list[int]:
    """So many of count indices, at equal distances."""
    return [index * count // min(wanted, count) for index in range(min(wanted, count))]


def _prompts(path: Path, context_length: int) -> Iterator[list[int]]:
    from answering.answer import encode_question
    from answering.questions import questions_of

    with errors_at(path), path.open("rb") as file:
        lines = list(questions_of(file.readline, "", as_objects=False))
    for asked in lines:
        try:
            if asked.error:
                raise UserError(asked.error)
            yield encode_question(asked.question, context_length)
        except UserError as error:
            raise UserError(f"{path}: line {asked.line}: {error}") from error


def _dataset(dataset: str, context_length: int) -> tuple[list[tuple[Any, Any]], int]:
    """The documents that fit, and the number of the others."""
    from data.rows import BadRow, open_sources
    from data.shapes import Shapes
    from instruct_format import encode_conversation

    documents = []
    for place, row in Shapes({}).examples(open_sources([dataset], {})):
        if isinstance(row, BadRow):
            raise UserError(f"{place}: {row}")
        if any(turn.output for turn in row.turns):
            documents.append(encode_conversation(row.turns))
    short = [document for document in documents if len(document[0]) <= context_length]
    return short, len(documents) - len(short)


def _prepared(options: Namespace, context_length: int) -> tuple[list[tuple[Any, Any]], int]:
    from data.shards import open_prepared
    from dataloader_instruct import InstructData

    data = InstructData(open_prepared(options.data_dir), options.split, context_length)
    return [data.example(number) for number in _spread(len(data), options.examples or len(data))], data.left_out


def evaluate(path: Path, state: dict[str, Any], cases: "Sequence[Case]", limit: int,
             device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A checkpoint's scores, and its answers of at most limit tokens. Raises CheckpointError when its weights give no
    finite numbers."""
    import torch
    from tqdm import tqdm

    from answering.batch import finished
    from answering.decode_weights import for_decoding
    from answering.scores import response_losses, scores_of
    from instruct_format import END_OF_TEXT, tokenizer
    from weights.checkpoint import model_of

    model = model_of(state, path, torch.device(device))
    if device == "cpu":
        for_decoding(model, int8=False)
    limits = [min(limit, model.config.context_length - len(case.prompt)) for case in cases]
    scored = [case for case in cases if case.spans]
    bar = partial(tqdm, desc=printable_line(path), leave=False, disable=None)  # on stderr, when that is a terminal
    try:
        losses = list(bar(response_losses(model, scored), total=len(scored)))
        found = dict(bar(finished(model, [case.prompt for case in cases], limits, stop_token=END_OF_TEXT),
                         total=len(cases)))
        answers = [found[index] for index in range(len(cases))]
        ended = [len(answer) < most for answer, most in zip(answers, limits)]
        scores = scores_of(cases, losses, answers, ended)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    about = f"step {state['step']}" if state["template"] else "pre-trained"
    return ({"checkpoint": str(path), "about": about, **scores._asdict()},
            [{"text": tokenizer().decode(answer), "ended": end} for answer, end in zip(answers, ended)])


def report_of(options: Namespace) -> dict[str, Any]:
    """What --json prints: the scores of each checkpoint, and each prompt as the models read it, the response that was
    expected after it, and the answers."""
    from training.precision import device_named

    paths = options.checkpoints or [path for path in DEFAULT if path.exists()]
    if not paths:
        raise UserError(f"no {' or '.join(map(str, DEFAULT))}; name a checkpoint, or fine-tune first")
    device, opened = device_named(options.device), [open_checkpoint(path) for path in paths]
    cases, left_out = read_cases(options, min(config.context_length for _, config in opened))
    found = [evaluate(path, state, cases, options.max_new_tokens, device) for path, (state, _) in zip(paths, opened)]
    from instruct_format import tokenizer

    texts = [[None if tokens is None else tokenizer().decode(tokens) for tokens in (case.prompt, case.expected)]
             for case in cases]
    return {"source": str(options.prompts or options.dataset or options.data_dir), "examples": len(cases),
            "left_out": left_out, "max_new_tokens": options.max_new_tokens,
            "checkpoints": [scores for scores, _ in found],
            "answers": [{"prompt": prompt, "expected": expected, "answers": list(answers)}
                        for (prompt, expected), *answers in zip(texts, *(answers for _, answers in found))]}


def tables_of(report: dict[str, Any], show: int) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The names of the checkpoints, and what was left out; their scores; some questions and answers, both below a line
    of column names."""
    names = [f"{number}. {scores['checkpoint']} ({scores['about']})"
             for number, scores in enumerate(report["checkpoints"], 1)]
    if report["left_out"]:
        names.append(f"left out as longer than the context: {report['left_out']:,}")
    scores = [["", *SCORES]] + [
        [str(number), *("-" if scores[name] is None else form.format(scores[name]) for name, form in SCORES.items())]
        for number, scores in enumerate(report["checkpoints"], 1)]
    answers = [["question", "expected", *(str(number) for number in range(1, len(report["checkpoints"]) + 1))]]
    for index in _spread(len(report["answers"]), show):
        case, question = report["answers"][index], report["answers"][index]["prompt"]
        for marker, shown in (("### Instruction:", ""), ("### Input:", "|"), ("### Response:", "->")):
            question = question.replace(marker, shown)
        answers.append([" ".join(question.split()).removesuffix(" ->"), case["expected"] or "-",
                        *(answer["text"] + " [...]" * (not answer["ended"]) for answer in case["answers"])])
    return names, scores, answers


def as_text(names: list[str], scores: list[list[str]], answers: list[list[str]]) -> str:
    """For a terminal of 80 columns."""
    widths = [max(map(len, column)) for column in zip(*scores)]
    lines = [*map(printable_line, names), "", *("  ".join(map(str.rjust, line, widths)) for line in scores)]
    for question, *texts in answers[1:]:
        lines += ["", *textwrap.wrap(printable_line(question), 79)]
        for name, text in zip(answers[0][1:], texts):
            wrapped = [part for line in printable(text.strip()).split("\n") for part in textwrap.wrap(line, 67) or [""]]
            lines += [f"  {name:<9} {wrapped[0]}", *(" " * 12 + line for line in wrapped[1:])]
    return "\n".join(lines)


def as_markdown(names: list[str], *tables: list[list[str]]) -> str:
    lines = list(map(printable_line, names))
    for head, *rest in tables:
        cells = [[printable(cell).replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>") for cell in line]
                 for line in (head, ["---"] * len(head), *rest)]
        lines += ["", *("| " + " | ".join(line) + " |" for line in cells)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    report = report_of(options)
    write = as_markdown if options.markdown else as_text
    print(json.dumps(report) if options.json else write(*tables_of(report, options.show)))
    return 0


if __name__ == "__main__":
    run(main)
