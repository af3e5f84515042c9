"""Prepare instruction data: a Hugging Face dataset, files or a pipe become token shards and a manifest.

    python src/prepare_instruct_dataset.py
    python src/prepare_instruct_dataset.py --dataset my_data.jsonl more.csv 'parts/*.parquet' --output_dir data_mine

The same input gives byte-identical output, whatever --num_proc says.
"""

import hashlib
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from cli import Parser, number, printable_line, run, usable_cpus  # first: it explains an import that fails

# isort: split
import numpy as np
from tqdm import tqdm

from data.report import Report, counts
from data.rows import KINDS, open_sources
from data.shapes import Example, Shapes
from data.shards import MANIFEST, SPLITS, DataWriter, Document
from data.values import NAMES, BadRow, BadSplit
from errors import UserError, errors_at
from instruct_format import encode_conversation
from weights.durable import lock_folder

DATASET = "vicgalle/alpaca-gpt4"
BATCH_EXAMPLES = 512  # what a tokenizing thread takes at once


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--dataset", nargs="+", action="extend", metavar="SOURCE",
                        help=f"datasets of the Hugging Face hub, files ({', '.join(KINDS)}, also as .gz), patterns "
                             f"such as 'part*.jsonl', or - for standard input (default: {DATASET})")
    parser.add_argument("--columns", nargs="+", action="extend", type=column, default=[], metavar="MEANING=NAME",
                        help="where columns are not recognised: what they mean, such as instruction=frage "
                             f"output=antwort; the meanings are {', '.join(NAMES)}; split= ignores that column")
    parser.add_argument("--subset", help="which configuration of a dataset of the hub")
    parser.add_argument("--split", help="which of its splits, to be divided here (default: train)")
    parser.add_argument("--revision", help="which branch, tag or commit of it")
    parser.add_argument("--streaming", action="store_true", help="read it from the hub without keeping a copy")
    parser.add_argument("--output_dir", type=Path, default=Path("data_instruct"), help="where the shards go")
    parser.add_argument("--val_fraction", type=number(float, 0, 0.99, above=True), default=0.05,
                        help="share of the prompts that go to val")
    parser.add_argument("--seed", type=int, default=42, help="decides which prompts go to val")
    parser.add_argument("--num_proc", type=number(int, 1, 1024), default=usable_cpus(),
                        help="how many tokenizers work at once")
    parser.add_argument("--skip_bad", action="store_true", help="drop and count rows that cannot be used")
    options = parser.parse_args(argv)
    options.dataset = options.dataset or [DATASET]
    if len(dict(options.columns)) < len(set(options.columns)):
        parser.error("--columns: a meaning has one column")
    return options


def column(text: str) -> tuple[str, str]:
    """What --columns takes: (meaning, column)."""
    meaning, equals, name = text.partition("=")
    if not equals or meaning not in NAMES:
        raise ArgumentTypeError(f"{text!r} is not MEANING=NAME with a MEANING of {', '.join(NAMES)}")
    return meaning, name


class Selection:
    """Decides row by row what is kept and where it goes, and counts what is dropped and why."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.sources = open_sources(options.dataset, {
            name: getattr(options, name) for name in ("subset", "split", "revision", "streaming")})
        self.shapes = Shapes(dict(options.columns))
        self.dropped: Counter[str] = Counter(empty_output=0, exact_repeat=0, bad_row=0)
        self.turns = self.conversations = 0  # turns that are kept, and examples of several
        self.first_bad = ""
        self.seen: set[bytes] = set()  # digests of whole examples
        self.sides: dict[int, str] = {}  # where the hash puts a prompt -> the split that its rows name
        self.places = array("Q")  # of every kept example: where the hash puts its prompt, in [0, 2^64)

    def kept(self) -> Iterator[tuple[str, Example]]:
        """Yield (split, example). Raises UserError at the first bad row unless --skip_bad."""
        for where, row in self.shapes.examples(self.sources):
            try:
                side = self._side(row)
            except BadRow as bad:
                if not self.options.skip_bad:
                    raise UserError(f"{where}: {bad}{bad.advice}") from bad
                self.first_bad = self.first_bad or f"{where}: {bad}"
                side = "bad_row"
            if isinstance(row, Example) and side in SPLITS:
                self.turns += len(row.turns)
                self.conversations += len(row.turns) > 1
                yield side, row
            else:
                self.dropped[side] += 1

    def _side(self, row: Example | BadRow) -> str:
        """train, val, or why to drop this row. A prompt (the first of a conversation) stands on the side that the
        row names, else where a seeded hash puts it, so equal ones go together. Raises BadRow where that cannot be."""
        if isinstance(row, BadRow):
            raise row
        if row.fault:
            return row.fault
        if row.split == "test":
            return "test_split"
        digest = _digest(repr(row.turns))
        if digest in self.seen:
            return "exact_repeat"
        self.seen.add(digest)
        if self.places and bool(self.sides) != bool(row.split):
            raise BadSplit("column 'split' must be in every row or in none")
        place = int.from_bytes(_digest(str(self.options.seed), *row.turns[0][:2])[:8], "big")
        side = row.split or ("val" if place < self.options.val_fraction * 2**64 else "train")
        if row.split and (other := self.sides.setdefault(place, side)) != side:
            raise BadRow(f"this prompt stands in split {other!r} already")
        self.places.append(place)
        return side

    def dealt_again(self) -> np.ndarray:
        """Where all examples are in one split: which go to val, by the hash of their prompt, but not all and not none.
        Raises UserError where that cannot be, saying why."""
        places = np.array(self.places)
        names, found = ", ".join(self.options.dataset), counts(len(places), self.dropped)
        if not len(places):
            raise UserError(f"{self.first_bad or f'{names}: nothing to train on'} ({found})"
                            + BadSplit.advice * ("test_split" in self.dropped))
        if (places == places[0]).all():
            raise UserError(f"{names}: train and val need a prompt each, and there is only one" +
                            ": all instructions are the same, with the same input" * (len(places) > 1) + f" ({found})")
        in_val = places < self.options.val_fraction * 2**64
        return (in_val | (places == places.min())) & (places != places.max())


def _digest(*fields: str) -> bytes:
    lengths = ",".join(str(len(field)) for field in fields)
    return hashlib.blake2b(f"{lengths}:{''.join(fields)}".encode(), digest_size=16).digest()


def _tokenize(batch: list[tuple[str, Example]]) -> list[tuple[str, Document]]:
    encoded = [(split, *encode_conversation(example.turns)) for split, example in batch]
    return [(split, Document(np.array(tokens, dtype=np.uint16), np.array(mask, dtype=np.uint8)))
            for split, tokens, mask in encoded]


def tokenized(rows: Iterator[tuple[str, Example]], workers: int) -> Iterator[tuple[str, Document]]:
    """Tokenize in threads (the tokenizer releases the interpreter), in order, reading only a little ahead."""
    with ThreadPoolExecutor(workers) as pool:
        batches = iter(lambda: list(islice(rows, BATCH_EXAMPLES)), [])
        submitted = (pool.submit(_tokenize, batch) for batch in batches)
        waiting = deque(islice(submitted, 2 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(islice(submitted, 1))


def prepare(options: Namespace, report: Report) -> tuple[dict[str, Any], list[str]]:
    """Write shards and manifest. Returns the manifest, and what was recognised and changed."""
    selection, writer = Selection(options), DataWriter(options.output_dir)
    documents = tokenized(selection.kept(), options.num_proc)
    for split, document in tqdm(documents, desc="tokenizing", unit=" examples", disable=None):  # on a terminal
        writer.add(split, document)
        report.add(document)
    if missing := selection.shapes.not_found:
        raise UserError(f"{', '.join(options.dataset)}: --columns: no row has a column {missing[0]!r}")
    notes = selection.shapes.notes(selection.turns / max(1, len(selection.places)))
    if writer.empty_splits:
        if selection.sides:
            notes.append(f"no row that is kept names {writer.empty_splits[0]}: a hash divides them, not their split")
        writer.deal_again(selection.dealt_again())
    names = [Path(name).name if Path(name).exists() else name for name, _ in selection.sources]
    source = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
    manifest = writer.finish({
        "source": source, "shape": " and ".join(selection.shapes.names), "seed": options.seed,
        "val_fraction": options.val_fraction, "total_examples": len(selection.places) + selection.dropped.total(),
        "dropped": dict(selection.dropped)},
        # Chat remembers the turns before where the model has seen such: in one in twenty documents at least
        multi_turn=20 * selection.conversations >= len(selection.places))
    return manifest, notes


def main(argv: list[str] | None = None) -> int:
    options, report = parse_options(argv), Report()
    with errors_at(options.output_dir), lock_folder(options.output_dir, "preparation", "--output_dir",
                                                    lambda text: print(printable_line(text), file=sys.stderr)):
        manifest, notes = prepare(options, report)
    report.show(manifest, notes)
    launcher, folder = "./start_instruct_training.sh", options.output_dir
    project = Path(__file__).resolve().parent.parent
    if Path.cwd() != project:  # to which it goes
        launcher, folder = str(project / launcher), folder.resolve()
    command = f"{shlex.quote(launcher)} --data_dir {shlex.quote(str(folder))}"
    print("\n" + printable_line(f"wrote {folder}/{MANIFEST}; next: {command}"))
    return 0


if __name__ == "__main__":
    run(main)
