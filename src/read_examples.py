"""Rows of a local .json, .jsonl, .csv or .parquet file, or of a Hugging Face dataset, one at a time and checked.

Memory does not grow with the file. Every complaint names the file, the row or line, and the reason.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cli import UserError

COLUMNS = ("instruction", "input", "output")
SPLITS = ("train", "val")
LONGEST_BLANK = 100_000  # the tokenizer fails from about a million blanks in a row on
_CHUNK_BYTES = 1 << 20
_BLANK = re.compile(rf"\s{{{LONGEST_BLANK}}}")


class BadRow(Exception):
    """One row that cannot be used. Skippable, unlike a file whose structure is broken (UserError)."""


class Example(NamedTuple):
    """One checked row, its fields stripped. split is None unless the data say where the row belongs."""

    instruction: str
    input: str
    output: str
    split: str | None = None


def read_examples(dataset: str) -> Iterator[tuple[str, Example | BadRow]]:
    """Yield (place, example or what is wrong with the row) for every row of a local file or hub dataset.

    Raises UserError when the source is missing, unreadable, or lacks a column.
    """
    path = Path(dataset)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and not path.exists():
        rows = _hub_rows(dataset)
    elif not path.is_file():
        raise UserError(f"{dataset}: no such file" if not path.exists() else f"{dataset}: not a file")
    elif reader is None:
        raise UserError(f"{dataset}: unknown kind of file; use {', '.join(_READERS)}")
    else:
        rows = reader(path)
    try:
        for place, row in rows:
            yield place, row if isinstance(row, BadRow) else _check(row)
    except OSError as error:
        raise UserError(f"{dataset}: {error.strerror or error}") from error


def _check(row: Any) -> Example | BadRow:
    """Return the row as an Example, or the reason why it is none. A null input means no input."""
    if not isinstance(row, dict):
        return BadRow(f"expected an object with {', '.join(COLUMNS)}, found {_kind(row)}")
    for name in COLUMNS:
        if name not in row:
            return BadRow(f"no column {name!r} (found: {', '.join(map(repr, row)) or 'none'})")
        value = row[name]
        if value is None and name == "input":
            continue
        if not isinstance(value, str):
            return BadRow(f"column {name!r} must be text, found {_kind(value)}")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return BadRow(f"column {name!r} has half of a surrogate pair, which is not text")
        if len(value) > LONGEST_BLANK and _BLANK.search(value):
            return BadRow(f"column {name!r} has {LONGEST_BLANK:,} blanks in a row, too many for the tokenizer")
    split = row.get("split")
    if split is not None and split not in SPLITS:
        return BadRow(f"column 'split' must be train or val, found {split!r}")
    return Example(row["instruction"].strip(), (row["input"] or "").strip(), row["output"].strip(), split)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return BadRow("nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON: {error}")


def _lines(path: Path) -> Iterator[tuple[str, str, BadRow | None]]:
    """(place, decoded line, what is wrong with it) of a text file; bytes that are not UTF-8 are replaced."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                yield f"line {number}", line.decode(encoding), None
            except UnicodeDecodeError as error:
                bad = BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} in column {error.start + 1}")
                yield f"line {number}", line.decode(encoding, errors="replace"), bad


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line, bad in _lines(path):
        if bad or line.strip():
            yield place, bad or _parse(line)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list, decoded one at a time; one object a line (JSON lines) is taken too."""
    with path.open("rb") as file:
        first = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"{":
        yield from _jsonl_rows(path)
    elif first == b"[":
        yield from _ListReader(path).rows()
    else:
        next(_chunks(path))  # a file that is not UTF-8 is told so
        raise UserError(f"{path}: line 1: expected a list of objects" + (", the file is empty" * (not first)))


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces. Raises UserError naming the line of a byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with path.open("rb") as file:
        while True:
            data = file.read(_CHUNK_BYTES)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[:error.start].count(b"\n")
                reason = f"byte 0x{error.object[error.start]:02x}"
                raise UserError(f"{path}: line {line}: not UTF-8: {reason}; save the file as UTF-8") from error
            line += text.count("\n")
            yield text
            if not data:
                return


class _ListReader:
    """Decodes a JSON list row by row; where the text so far ends inside a row, it reads on and tries again."""

    def __init__(self, path: Path) -> None:
        self.path, self.chunks = path, _chunks(path)
        self.text, self.at, self.row = "", 0, 0
        self.line = 1  # of the first character of text

    def rows(self) -> Iterator[tuple[str, Any]]:
        self.take()  # the opening bracket, which the caller has seen
        if self.peek() == "]":
            self.take()
        else:
            following = ","
            while following == ",":
                self.row += 1
                yield f"row {self.row}", self.value()
                following = self.take()
            if following != "]":
                self.fail(f"expected , or ] after row {self.row}" if following else "the list is not closed")
        if self.peek():
            self.fail("there is text after the list")

    def more(self) -> bool:
        """Let go of what was decoded and read on. False at the end of the file."""
        self.line += self.text.count("\n", 0, self.at)
        chunk = next(self.chunks, "")
        self.text, self.at = self.text[self.at:] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, without taking it; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self) -> str:
        character = self.peek()
        self.at += 1
        return character

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError:
                self.fail("nested too deeply")
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                at = error.pos - self.at
                if not (cut_off and self.more()):
                    self.fail(f"not JSON: {error.msg}", self.at + at)
            except ValueError as error:  # a whole number of thousands of digits
                self.fail(f"not JSON: {error}")
            else:
                self.at = end
                return value

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        """Raise UserError, naming the line of character `at` of text (default: where reading stands)."""
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        raise UserError(f"{self.path}: line {line}, row {self.row}: {reason}")


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    broken: list[tuple[str, BadRow]] = []  # lines of the row being read that are not UTF-8

    def decoded() -> Iterator[str]:
        for place, line, bad in _lines(path):
            if bad:
                broken.append((place, bad))
            yield line

    reader = csv.reader(decoded(), strict=True)
    try:
        header = next(reader, [])
        if broken:
            raise UserError(f"{path}: {broken[0][0]}: {broken[0][1]}; save the file as UTF-8")
        _require_columns(path, header)
        for fields in reader:
            if broken:
                yield broken[0]
                broken.clear()
            elif len(fields) == len(header):
                yield f"line {reader.line_num}", dict(zip(header, fields))
            elif fields:
                yield f"line {reader.line_num}", BadRow(f"expected {len(header)} columns as in the first line, found "
                                                        f"{len(fields)}")
    except csv.Error as error:
        place, reason = broken[0] if broken else (f"line {reader.line_num}", error)
        raise UserError(f"{path}: {place}: {reason}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(path, names)
            for batch in file.iter_batches(1000, columns=[*COLUMNS, *({"split"} & set(names))]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the format's
            raise
        raise UserError(f"{path}: after row {number}: not a readable Parquet file: {error}") from error


def _require_columns(source: Path | str, found: Iterable[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise UserError(f"{source}: no column {', '.join(map(repr, missing))} (found: {', '.join(map(repr, found))})")


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries are told once, below
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client fails in as many ways as networks do
        raise UserError(
            f"{name}: not a local file, and loading it from the Hugging Face hub failed ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}); check the name and "
            "the network, pass a local file with --dataset FILE, or try ./start_instruct_training.sh demo") from error
    _require_columns(name, rows.column_names)
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


_DECODER = json.JSONDecoder()
_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
