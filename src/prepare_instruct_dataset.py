"""Prepare instruction data: a Hugging Face dataset or a local file becomes token shards and a manifest.

    python src/prepare_instruct_dataset.py
    python src/prepare_instruct_dataset.py --dataset my_data.jsonl --output_dir data_mine

The same input gives byte-identical output, whatever --num_proc says.
"""

import hashlib
import os
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli import Parser, number, printable_line, run
from data.report import Report
from data.rows import BadRow
from data.shapes import Example, read_examples
from data.shards import MANIFEST, DataWriter, Document
from errors import UserError, errors_at
from instruct_format import encode_example
from weights.durable import lock_folder

BATCH_EXAMPLES = 512  # what a tokenizing thread takes at once


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="vicgalle/alpaca-gpt4",
                        help="a dataset of the Hugging Face hub, or a .json, .jsonl, .csv or .parquet file with the "
                             "columns instruction, input, output and perhaps split (train or val) "
                             "(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("data_instruct"),
                        help="where the shards go (default: %(default)s)")
    parser.add_argument("--val_fraction", type=number(float, 0, 0.99, above=True), default=0.05,
                        help="share of the prompts held out for validation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42,
                        help="decides which prompts are held out (default: %(default)s)")
    parser.add_argument("--num_proc", type=number(int, 1, 1024), default=os.cpu_count() or 1,
                        help="how many tokenizers work at once (default: %(default)s)")
    parser.add_argument("--skip_bad", action="store_true", help="drop and count rows that cannot be used")
    return parser.parse_args(argv)


class Selection:
    """Decides row by row what is kept and where it goes, and counts what is dropped and why."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.read = 0
        self.dropped: Counter[str] = Counter(empty_output=0, exact_repeat=0, bad_row=0)
        self.splits_are_given: bool | None = None  # by the rows; known from the first one on
        self.seen: set[bytes] = set()  # digests of whole examples
        self.sides: dict[bytes, str] = {}  # digest of a prompt -> the split that its rows name

    def kept(self) -> Iterator[tuple[str, Example]]:
        """Yield (split, example). Raises UserError at the first bad row unless --skip_bad."""
        for place, row in read_examples(self.options.dataset):
            self.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                split, reason = self._split(row), self._reason_to_drop(row)
            except BadRow as bad:
                if not self.options.skip_bad:
                    raise UserError(f"{self.options.dataset}: {place}: {bad} (--skip_bad drops such rows)") from bad
                self.dropped["bad_row"] += 1
                continue
            if reason:
                self.dropped[reason] += 1
            else:
                yield split, row

    def _reason_to_drop(self, row: Example) -> str | None:
        if not row.output:
            return "empty_output"
        digest = _digest(row.instruction, row.input, row.output)
        if digest in self.seen:
            return "exact_repeat"
        self.seen.add(digest)
        return None

    def _split(self, row: Example) -> str:
        """The side of a prompt: named by the row, or by a seeded hash of the prompt, so equal prompts go together.
        Raises BadRow where a row would put a prompt on a second side, or where only some rows name a side."""
        if self.splits_are_given is None:
            self.splits_are_given = row.split is not None
        if self.splits_are_given != (row.split is not None):
            raise BadRow("column 'split' must be given in every row or in none")
        if row.split is None:
            digest = _digest(str(self.options.seed), row.instruction, row.input)
            return "val" if int.from_bytes(digest[:8], "big") < self.options.val_fraction * 2**64 else "train"
        side = self.sides.setdefault(_digest(row.instruction, row.input), row.split)
        if side != row.split:
            raise BadRow(f"this prompt stands in split {side!r} already")
        return side


def _digest(*fields: str) -> bytes:
    lengths = ",".join(str(len(field)) for field in fields)
    return hashlib.blake2b(f"{lengths}:{''.join(fields)}".encode(), digest_size=16).digest()


def _tokenize(batch: list[tuple[str, Example]]) -> list[tuple[str, Document]]:
    documents = []
    for split, example in batch:
        tokens, mask = encode_example(example.instruction, example.input, example.output)
        documents.append((split, Document(np.array(tokens, dtype=np.uint16), np.array(mask, dtype=np.uint8))))
    return documents


def tokenized(rows: Iterable[tuple[str, Example]], workers: int) -> Iterator[tuple[str, Document]]:
    """Tokenize in threads (the tokenizer releases the interpreter), in order, reading only a little ahead."""
    rows = iter(rows)
    with ThreadPoolExecutor(workers) as pool:
        batches = iter(lambda: list(islice(rows, BATCH_EXAMPLES)), [])
        waiting = deque(pool.submit(_tokenize, batch) for batch in islice(batches, 2 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_tokenize, batch) for batch in islice(batches, 1))


def prepare(options: Namespace, report: Report) -> dict[str, Any]:
    """Write shards and manifest into the folder, which this process holds, and return the manifest."""
    selection, writer = Selection(options), DataWriter(options.output_dir)
    documents = tokenized(selection.kept(), options.num_proc)
    for split, document in tqdm(documents, desc="tokenizing", unit=" examples", disable=None):
        writer.add(split, document)
        report.add(document)
    if writer.empty_splits:
        kept = selection.read - selection.dropped.total()
        raise UserError(f"{options.dataset}: no example for the {writer.empty_splits[0]} split ({kept} kept of "
                        f"{selection.read} read); use more data, or another --val_fraction or --seed")
    local = Path(options.dataset)
    return writer.finish({
        "source": local.name if local.is_file() else options.dataset, "seed": options.seed,
        "val_fraction": options.val_fraction, "total_examples": selection.read, "dropped": dict(selection.dropped)})


def main(argv: list[str] | None = None) -> int:
    options, report = parse_options(argv), Report()
    with errors_at(options.output_dir), lock_folder(options.output_dir, "preparation", "--output_dir"):
        manifest = prepare(options, report)
    report.show(manifest)
    print(f"\nwrote {printable_line(options.output_dir)}/{MANIFEST}; next: ./start_instruct_training.sh")
    return 0


if __name__ == "__main__":
    run(main)
