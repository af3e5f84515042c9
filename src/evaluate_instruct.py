"""How good checkpoints are, side by side: loss, perplexity, what their greedy answers are like, and the answers.

    python src/evaluate_instruct.py checkpoints/best_model.pt checkpoints_instruct/best_model.pt

All get the same prompts in the same template, a model that was only pre-trained too. Everything is verified before
anything is computed.
"""

import json
import re
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answering.settings import add_flags
from cli import Parser, number, printable, printable_line, run
from errors import CheckpointError, UserError, errors_at, python

if TYPE_CHECKING:
    from answering.scores import Case

DEFAULT = (Path("checkpoints/best_model.pt"), Path("checkpoints_instruct/best_model.pt"))
SCORES = {"loss": "{:.4f}", "perplexity": "{:,.2f}", "ended": "{:.1%}", "tokens": "{:.1f}", "repeated": "{:.1%}",
          "exact": "{:.1%}"}  # how each is written


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser("Compare checkpoints: loss, perplexity, and what their greedy answers are like.",
                    epilog="loss: of the tokens of the expected answers; perplexity: e to the loss; ended: share of "
                           "the answers that end by themselves; tokens: their mean length; repeated: share of repeated "
                           "4-grams; exact: share of the answers that are the expected one")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="*",
                        help="checkpoints, or pre-trained models (files or folders); default: "
                             + " and ".join(map(str, DEFAULT)) + ", as far as they are there")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data_dir", type=Path, default=Path("data_instruct"), help="prepared data: its val split")
    source.add_argument("--dataset", help="examples of a file instead, in any form that the preparation takes")
    source.add_argument("--prompts", type=Path, help="questions instead, one a line, as text or in a .jsonl as chat "
                        "takes them: no loss then")
    parser.add_argument("--examples", type=number(int, 0), default=64, help="this many, spread over all; 0 means all")
    add_flags(parser, "max_new_tokens")
    parser.add_argument("--show", type=number(int, 0), default=4, help="answers to show")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object, with all answers")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser.parse_intermixed_args(argv)


def report_of(options: Namespace) -> dict[str, Any]:
    """What --json prints: the scores of each checkpoint, and each prompt as the models read it, the response that was
    expected after it, and the answers."""
    import torch
    from tqdm import tqdm

    from answering.opened import open_model
    from answering.scores import evaluate
    from instruct_format import tokenizer
    from training.precision import device_named, failures_explained

    paths = options.checkpoints or [path for path in DEFAULT if path.exists()]
    if not paths:
        raise UserError(f"no {' or '.join(map(str, DEFAULT))}; name a checkpoint, or fine-tune first")
    device, opened = torch.device(device_named(options.device)), [open_model(path) for path in paths]
    cases, left_out = read_cases(options, min(model.config.context_length for model, _ in opened))
    decode = tokenizer().decode
    report: dict[str, Any] = {
        "source": str(options.prompts or options.dataset or options.data_dir), "examples": len(cases),
        "left_out": left_out, "max_new_tokens": options.max_new_tokens, "checkpoints": [],
        "answers": [{"prompt": decode(case.prompt), "expected": decode(case.expected) if case.spans else None,
                     "answers": []} for case in cases]}
    for path in paths:
        model, state = opened.pop(0)  # so that no more than one is in memory
        bar = partial(tqdm, desc=printable_line(path), leave=False, disable=None)  # on stderr, when it is a terminal
        try:
            with failures_explained(device):
                scores, answers = evaluate(model.to(device), cases, options.max_new_tokens, bar)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        tuned = f"step {state['step']}" if state["step"] else "fine-tuned"  # an exported one does not say more
        report["checkpoints"].append({"checkpoint": str(path), "about": tuned if state["template"] else "pre-trained",
                                      **scores})
        for case, (tokens, is_ended) in zip(report["answers"], answers):
            case["answers"].append({"text": decode(tokens), "ended": is_ended})
    return report


def read_cases(options: Namespace, context_length: int) -> "tuple[list[Case], int]":
    """What is to be scored, and how many examples were left out because they are too long. Raises UserError where the
    source is missing or broken."""
    from answering.scores import Case
    from data.shards import open_prepared
    from dataloader_instruct import InstructData
    from instruct_format import trained_spans

    if options.prompts:
        documents: list[Any] = [(tokens, []) for tokens in _prompts(options.prompts, context_length)]
    elif options.dataset is not None:
        documents = _dataset(options.dataset)
    else:
        data = InstructData(open_prepared(options.data_dir), "val", 1 << 30)
        documents = [data.example(number) for number in range(len(data))]
    fitting = [document for document in documents if len(document[0]) <= context_length]
    if not fitting:
        reason = f"none of {len(documents):,} fits a context of {context_length}" if documents else (
            "no question in it" if options.prompts else "no question with an answer to train on in it")
        raise UserError(f"{options.prompts or options.dataset or options.data_dir}: nothing to evaluate: {reason}")
    cases = [Case(list(map(int, tokens)), trained_spans(mask))
             for tokens, mask in _spread(fitting, options.examples or len(fitting))]
    return cases, len(documents) - len(fitting)


def _spread(items: list[Any], wanted: int) -> list[Any]:
    """So many of them, at equal distances."""
    wanted = min(wanted, len(items))
    return [items[index * len(items) // wanted] for index in range(wanted)]


def _prompts(path: Path, context_length: int) -> Iterator[list[int]]:
    from answering.answer import encode_question
    from answering.questions import questions_of

    as_objects = path.suffix.lower() in (".jsonl", ".ndjson")
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet", ".gz"):
        raise UserError(f"{path}: not questions, a line each; --dataset reads it if it has answers too")
    with errors_at(path), path.open("rb") as file:
        for _, tokens in questions_of(file.readline, "", as_objects, partial(encode_question, context_length)):
            if isinstance(tokens, UserError):
                raise UserError(f"{path}: {tokens}")
            yield tokens


def _dataset(dataset: str) -> list[tuple[Any, Any]]:
    """Tokens and loss mask of each row."""
    from data.rows import open_sources
    from data.shapes import Shapes
    from data.values import BadRow
    from instruct_format import encode_conversation

    documents = []
    sources = open_sources([dataset], {})
    try:
        for place, row in Shapes({"split": ""}).examples(sources):
            if isinstance(row, BadRow):
                raise UserError(f"{place}: {row}")
            if not row.fault:
                documents.append(encode_conversation(row.turns))
    except UserError as error:
        raise UserError(f"{error}; if it needs --columns, --split or --skip_bad, prepare it first: {python()} "
                        "src/prepare_instruct_dataset.py --output_dir FOLDER, and then --data_dir FOLDER") from error
    return documents


def tables_of(report: dict[str, Any], show: int) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The names of the checkpoints, and what was left out; their scores; some questions and answers, both below a line
    of column names."""
    names, scores, answers = list[str](), [["", *SCORES]], [["question", "expected"]]
    for place, found in enumerate(report["checkpoints"], 1):
        names.append(f"{place}. {found['checkpoint']} ({found['about']})")
        scores.append([f"{place}", *("-" if found[name] is None else form.format(found[name])
                                     for name, form in SCORES.items())])
        answers[0].append(f"{place}")
    left_out = f"; left out as longer than the context: {report['left_out']:,}" * bool(report["left_out"])
    names.append(f"examples: {report['examples']:,}{left_out}")
    for case in _spread(report["answers"], show):
        question = re.sub("(<.endoftext.>)?### (Instruction|Input|Response):\n", " | ", case["prompt"])
        answers.append([" ".join(question.split()).strip("| "), case["expected"] or "-",
                        *(answer["text"] + " [...]" * (not answer["ended"]) for answer in case["answers"])])
    return names, scores, answers


def as_text(names: list[str], scores: list[list[str]], answers: list[list[str]]) -> str:
    """For a terminal of 80 columns."""
    widths = [max(map(len, column)) for column in zip(*scores)]
    lines = [*map(printable_line, names), "", *("  ".join(map(str.rjust, line, widths)) for line in scores)]
    for question, *texts in answers[1:]:
        lines += ["", *textwrap.wrap(printable_line(question), 79)]
        for name, text in zip(answers[0][1:], texts):
            wrapped = "\n".join(textwrap.fill(line, 67) for line in printable(text.strip()).split("\n"))
            lines.append(f"  {name:<10}" + textwrap.indent(wrapped, " " * 12)[12:])
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
