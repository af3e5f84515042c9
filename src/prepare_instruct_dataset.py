"""Prepare instruction data: a Hugging Face dataset or a local file becomes token shards and a manifest.

    python src/prepare_instruct_dataset.py
    python src/prepare_instruct_dataset.py --dataset my_data.jsonl --output_dir data_mine

The same input gives byte-identical output, whatever --num_proc says. Shards are named by their content and written
beside whatever is there; then the manifest is replaced in one step; then shards that no manifest names are removed.
Killed at any moment, the folder holds the old dataset or the new one, whole. A second preparation into the folder is
refused as long as the first runs.
"""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cli import Parser, UserError, number, printable_line, run
from data_report import Report
from durable import TEMPORARY_SUFFIX, durable_file, lock_folder
from manifest import FORMAT_VERSION, KINDS, MANIFEST, manifest_bytes, shard_file
from read_examples import BadRow, Example, read_examples

SHARD_TOKENS = 1 << 24  # 48 MiB of tokens and loss mask
BATCH_EXAMPLES = 512  # handed to a tokenizing thread at once


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


class Tokenized(NamedTuple):
    """One tokenized example on its way into a shard."""

    split: str
    tokens: Any  # (n_tokens,) uint16
    prompt_tokens: int


class Selection:
    """Decides row by row what is kept and where it goes, and counts what is dropped and why."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.read = 0
        self.dropped: Counter[str] = Counter(empty_output=0, exact_repeat=0, bad_row=0)
        self.splits_are_given: bool | None = None  # by the rows; known from the first one on
        self.seen = sqlite3.connect("", isolation_level=None)  # a temporary file, so memory does not grow with the rows
        self.seen.execute("PRAGMA journal_mode=OFF")
        self.seen.execute("CREATE TABLE examples (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.seen.execute("CREATE TABLE prompts (digest BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID")
        self.seen.execute("BEGIN")

    def kept(self) -> Iterator[tuple[str, tuple[str, str, str]]]:
        """Yield (split, (instruction, input, output)). Raises UserError at the first bad row unless --skip_bad."""
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
            else:
                if reason:
                    self.dropped[reason] += 1
                else:
                    yield split, (row.instruction, row.input, row.output)

    def _reason_to_drop(self, row: Example) -> str | None:
        if not row.output:
            return "empty_output"
        digest = _digest(row.instruction, row.input, row.output)
        is_new = self.seen.execute("INSERT OR IGNORE INTO examples VALUES (?)", (digest,)).rowcount
        return None if is_new else "exact_repeat"

    def _split(self, row: Example) -> str:
        """The side of a prompt: given by the row, or by a seeded hash of the prompt, so equal prompts go together.
        Raises BadRow where a row would put a prompt on a second side, or where only some rows name a side."""
        if self.splits_are_given is None:
            self.splits_are_given = row.split is not None
        if self.splits_are_given != (row.split is not None):
            raise BadRow("column 'split' must be given in every row or in none")
        if row.split is None:
            digest = _digest(str(self.options.seed), row.instruction, row.input)
            return "val" if int.from_bytes(digest[:8], "big") < self.options.val_fraction * 2**64 else "train"
        prompt = _digest(row.instruction, row.input)
        self.seen.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?)", (prompt, row.split))
        side, = self.seen.execute("SELECT split FROM prompts WHERE digest = ?", (prompt,)).fetchone()
        if side != row.split:
            raise BadRow(f"this prompt stands in split {side!r} already")
        return side


def _digest(*fields: str) -> bytes:
    lengths = ",".join(str(len(field)) for field in fields)
    return hashlib.blake2b(f"{lengths}:{''.join(fields)}".encode(), digest_size=16).digest()


def _tokenize(batch: list[tuple[str, tuple[str, str, str]]]) -> list[Tokenized]:
    import numpy as np

    from instruct_format import encode_example

    result = []
    for split, fields in batch:
        tokens, mask = encode_example(*fields)
        result.append(Tokenized(split, np.array(tokens, dtype=np.uint16), len(mask) - sum(mask)))
    return result


def tokenized(rows: Iterable[tuple[str, tuple[str, str, str]]], workers: int) -> Iterator[Tokenized]:
    """Tokenize in threads (the tokenizer releases the interpreter), in order, reading only a little ahead."""
    rows = iter(rows)
    waiting: deque[Future[list[Tokenized]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(waiting) < 2 * workers and (batch := list(islice(rows, BATCH_EXAMPLES))):
                waiting.append(pool.submit(_tokenize, batch))
            if not waiting:
                return
            yield from waiting.popleft().result()


class ShardWriter:
    """Collects one split's examples and writes them as shards of at most SHARD_TOKENS tokens (or one example)."""

    def __init__(self, data_dir: Path, split: str) -> None:
        self.data_dir, self.split = data_dir, split
        self.shards: list[dict[str, Any]] = []
        self.examples: list[Tokenized] = []
        self.waiting_tokens = 0
        (data_dir / split).mkdir(parents=True, exist_ok=True)

    def add(self, example: Tokenized) -> None:
        if self.examples and self.waiting_tokens + len(example.tokens) > SHARD_TOKENS:
            self.flush()
        self.examples.append(example)
        self.waiting_tokens += len(example.tokens)

    def flush(self) -> None:
        """Write what waits as one shard: tokens uint16, loss_mask uint8, and the start of each example int64."""
        import numpy as np

        if not self.examples:
            return
        lengths = np.array([len(example.tokens) for example in self.examples], dtype=np.int64)
        ends = np.cumsum(lengths)
        mask = np.ones(ends[-1], dtype=np.uint8)
        for end, length, example in zip(ends, lengths, self.examples):
            mask[end - length:end - length + example.prompt_tokens] = 0
        arrays = (np.concatenate([example.tokens for example in self.examples]), mask, ends - lengths)
        files = {kind: _npy_bytes(array) for kind, array in zip(KINDS, arrays)}
        digests = {kind: hashlib.sha256(data).hexdigest() for kind, data in files.items()}
        name = f"{len(self.shards):05d}-{hashlib.sha256(''.join(digests.values()).encode()).hexdigest()[:16]}"
        shard = {"name": name, "examples": len(lengths), "tokens": int(ends[-1]),
                 "response_tokens": int(mask.sum()), "sha256": digests}
        for kind, data in files.items():
            with durable_file(shard_file(self.data_dir, self.split, shard, kind)) as file:
                file.write(data)
        self.shards.append(shard)
        self.examples, self.waiting_tokens = [], 0

    def total(self, key: str) -> int:
        return sum(shard[key] for shard in self.shards)


def _npy_bytes(array: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def build_manifest(options: Namespace, selection: Selection, writers: dict[str, ShardWriter]) -> dict[str, Any]:
    from instruct_format import TEMPLATE, TOKENIZER

    local = Path(options.dataset)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "template": TEMPLATE, "tokenizer": TOKENIZER,
        "source": local.name if local.is_file() else options.dataset, "seed": options.seed,
        "val_fraction": options.val_fraction, "total_examples": selection.read,
        "dropped": dict(selection.dropped),
    }
    for split, writer in writers.items():
        for key in ("examples", "tokens", "response_tokens"):
            manifest[f"{split}_{key}"] = writer.total(key)
    manifest["shards"] = {split: writer.shards for split, writer in writers.items()}
    return manifest


def remove_unnamed(output_dir: Path, manifest: dict[str, Any]) -> None:
    """Remove shard files, whole or half-written, that the manifest does not name."""
    for split, shards in manifest["shards"].items():
        named = {shard_file(output_dir, split, shard, kind) for shard in shards for kind in KINDS}
        for path in (output_dir / split).iterdir():
            if path.name.removesuffix(TEMPORARY_SUFFIX).endswith(".npy") and path not in named:
                path.unlink()


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder: two preparations would remove each other's shards. The system lets go when the process ends,
    however it ends. Raises UserError naming the process that holds it."""
    with lock_folder(output_dir, "preparation", "--output_dir") as file:
        try:
            yield
        finally:
            file.truncate(0)


def prepare(options: Namespace, selection: Selection, report: Report) -> dict[str, Any]:
    """Write shards and manifest, remove what is stale, and return the manifest."""
    from tqdm import tqdm

    writers = {split: ShardWriter(options.output_dir, split) for split in ("train", "val")}
    examples = tokenized(selection.kept(), options.num_proc)
    for example in tqdm(examples, desc="tokenizing", unit=" examples", disable=None):
        writers[example.split].add(example)
        report.add(example)
    for split, writer in writers.items():
        writer.flush()
        if not writer.shards:
            kept = selection.read - selection.dropped.total()
            raise UserError(f"{options.dataset}: no example for the {split} split ({kept} kept of {selection.read} "
                            "read); use more data, or another --val_fraction or --seed")
    manifest = build_manifest(options, selection, writers)
    with durable_file(options.output_dir / MANIFEST) as file:
        file.write(manifest_bytes(manifest))
    remove_unnamed(options.output_dir, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    report = Report()
    try:
        with locked(options.output_dir):
            manifest = prepare(options, Selection(options), report)
    except OSError as error:
        raise UserError(f"{options.output_dir}: {error.strerror or error}") from error
    except sqlite3.Error as error:
        raise UserError(f"the temporary file that finds repeated rows: {error}; free some space there, or set "
                        "SQLITE_TMPDIR to another folder") from error
    report.show(manifest)
    print(f"\nwrote {printable_line(options.output_dir)}/{MANIFEST}; next: ./start_instruct_training.sh")
    return 0


if __name__ == "__main__":
    run(main)
