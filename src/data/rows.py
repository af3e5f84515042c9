"""Rows of a local .json, .jsonl, .csv or .parquet file, or of a Hugging Face dataset, one at a time with their place.

Nothing in here knows what a row means. The readers are our own because `datasets`, which serves the hub, turns the CSV
text null into nothing, takes lines that are not UTF-8, and loses the numbers of lines.
"""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, errors_at


class BadRow(Exception):
    """One row that cannot be used. It can be skipped, unlike a file whose structure is broken (UserError)."""


class Rows(NamedTuple):
    """What a source holds. columns are known beforehand where the file names them once."""

    columns: list[str] | None
    rows: Iterator[tuple[str, Any]]  # (place such as "line 3", the row or a BadRow)


def open_rows(dataset: str) -> Rows:
    """The rows of a local file or hub dataset. Raises UserError when it is missing or broken, here or while reading."""
    path = Path(dataset)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and not path.exists():
        return _hub_rows(dataset)
    if not path.is_file():
        raise UserError(f"{dataset}: no such file" if not path.exists() else f"{dataset}: not a file")
    if reader is None:
        raise UserError(f"{dataset}: unknown kind of file; use {', '.join(_READERS)}")
    return reader(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file. Raises UserError naming the first byte that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number}: not UTF-8: byte 0x{line[error.start]:02x} in column "
                                f"{error.start + 1}; save the file as UTF-8") from error


def _jsonl_rows(path: Path) -> Rows:
    def parse(text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadRow(f"cannot be read as JSON: {error}")

    return Rows(None, ((f"line {number}", parse(line)) for number, line in enumerate(_lines(path), 1) if line.strip()))


def _json_rows(path: Path) -> Rows:
    """A JSON list, read whole; one object a line (JSON lines) is taken too."""
    text = "".join(_lines(path))
    if text.lstrip().startswith("{"):
        return _jsonl_rows(path)
    with errors_at(f"{path}: cannot be read as JSON", ValueError, RecursionError):
        values = json.loads(text) if text.strip() else []
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: expected a list of objects, found {'an empty file' if not text.strip() else 'none'}")
    return Rows(None, ((f"row {number}", value) for number, value in enumerate(values, 1)))


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), strict=True)

    def records() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}") from error

    def rows() -> Iterator[tuple[str, Any]]:
        for fields in rest:
            if len(fields) == len(header):
                yield f"line {reader.line_num}", dict(zip(header, fields))
            elif fields:
                yield f"line {reader.line_num}", BadRow(f"expected {len(header)} columns as in the first line, found "
                                                        f"{len(fields)}")

    rest = records()
    header = next(rest, [])
    return Rows(header, rows())


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet

    def reading() -> AbstractContextManager[None]:
        return errors_at(f"{path}: not a readable Parquet file", pyarrow.ArrowException, UnicodeDecodeError)

    def rows() -> Iterator[tuple[str, Any]]:
        number = 0
        with reading():
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row

    with reading():
        file = pyarrow.parquet.ParquetFile(path)
    return Rows(file.schema_arrow.names, rows())


def _hub_rows(name: str) -> Rows:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries are reported once, below
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with errors_at(f"{name}: not a local file, and loading it from the Hugging Face hub failed", Exception,
                   advice="; check the name and the network, pass a local file with --dataset FILE, or try "
                   "./start_instruct_training.sh demo"):  # the hub client fails in as many ways as networks do
        rows = datasets.load_dataset(name, split="train")
    return Rows(rows.column_names, ((f"row {number}", row) for number, row in enumerate(rows, 1)))


_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
