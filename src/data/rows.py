"""Rows of files, pipes and Hugging Face datasets, one at a time, each with its place.

Nothing in here knows what a row means. The readers are our own because `datasets`, which serves the hub, turns the CSV
text null into nothing, takes lines that are not UTF-8, and loses the numbers of lines.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any, NamedTuple

from data.advice import CUT, for_folder, refuse_foreign
from errors import UserError, errors_at


class Number(str):
    """A number as the JSON text writes it."""


STDIN = "-"
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # each also as .gz
BY_CONTENT = ("", ".txt")  # a file of these kinds is what its first bytes say, like a pipe
WRAPPERS = ("data", "rows", "examples", "instances", "records", "items")  # keys of a JSON object that hold its rows
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test",
               **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val")}
QUESTIONS = ("instruction", "prompt", "question", "query", "inputs", "problem", "human", "user", "message_1", "input")
TALKS = ("messages", "conversations", "conversation")
ANSWERS = ("output", "response", "completion", "solution", "answer", "targets", "target", "assistant", "message_2")
_JSON = json.JSONDecoder(parse_int=Number, parse_float=Number,
                         parse_constant=lambda name: None if name == "NaN" else Number(name))
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# Names that end so are of files, not of datasets of the hub
_FILES = (*KINDS, ".gz", ".txt", ".log", ".md", ".yaml", ".xlsx", ".pdf", ".zip", ".zst", ".bz2", ".xz", ".arrow")


class BadRow(Exception):
    """One row that cannot be used. It can be skipped, unlike a file whose structure is broken (UserError)."""

    def __init__(self, reason: str, advice: str = " (--skip_bad drops such rows)") -> None:
        super().__init__(reason)
        self.advice = advice


class Source(NamedTuple):
    name: str
    rows: Iterator[tuple[str, Any]]  # (place such as "line 3", the row or a BadRow)


def open_sources(names: Iterable[str], hub: Mapping[str, Any]) -> list[Source]:
    """The files that names and patterns stand for, each once, and datasets of the hub, which it loads as hub says.
    Raises UserError when one is missing or broken, here or while its rows are read."""
    found: dict[str, str] = {}
    for name in names:
        matches = [name]
        if glob.has_magic(name) and not os.path.exists(name):
            matches = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
            if not matches:
                raise UserError(f"{name}: no file matches")
        found |= {os.path.realpath(match): match for match in matches}
    return [Source("standard input" if name == STDIN else name, _rows(name, hub)) for name in found.values()]


def _rows(name: str, hub: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    path, kind = Path(name), Path(name.lower().removesuffix(".gz")).suffix
    if name != STDIN:
        if not name or not path.exists():
            is_local = name.lower().endswith(_FILES) or "/" in name and path.parent.is_dir()
            if not is_local and _HUB_NAME.fullmatch(name):
                return _hub_rows(name, **hub)
            raise UserError(f"{name or 'an empty name'}: no such file")
        if path.is_dir():
            raise UserError(f"{name}: not a file; {for_folder(name, KINDS)}")
        if path.is_file() and kind not in KINDS + BY_CONTENT:
            with errors_at(name), path.open("rb") as file:
                start = file.peek(512)
            refuse_foreign(name, start)
            raise UserError(f"{name}: unknown kind of file; use {', '.join(KINDS)}, also as .gz"
                            + f", or pipe it into --dataset {STDIN}" * (b"\0" not in start))
    if any(hub.values()):
        raise UserError(f"{name}: --split, --subset, --revision and --streaming are for datasets of the hub")
    return _file_rows(name, kind)


def _file_rows(name: str, kind: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file or pipe. What its kind does not say, its content does."""
    place = "standard input" if name == STDIN else name
    with (errors_at(place), sys.stdin.buffer if name == STDIN else open(name, "rb") as opened,
          errors_at(place, EOFError, zlib.error, advice=f"; {CUT}")):
        file: Any = opened
        if zipped := file.peek(2).startswith(b"\x1f\x8b"):
            file = io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
        refuse_foreign(place, file.peek(16))
        if kind == ".parquet" or file.peek(4).startswith(b"PAR1"):
            yield from _parquet_rows(place, io.BytesIO(file.read()) if zipped or not os.path.isfile(name) else name)
            return
        lines = _lines(place, file)
        head, filled = list[str](), 0  # up to the second line that is not blank
        while filled < 2 and (line := next(lines, None)) is not None:
            head.append(line)
            filled += bool(line.strip())
        is_table = kind in (".csv", ".tsv") or kind not in KINDS and not "".join(head).lstrip().startswith(("{", "["))
        yield from (_csv_rows if is_table else _json_rows)(place, head, lines)


def _lines(place: str, file: io.BufferedReader) -> Iterator[str]:
    """The lines of a text. Raises UserError naming the first byte that is none of it."""
    start, number = file.peek(2)[:2], 0
    is_utf_16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if re.fullmatch(rb"\0[\t\r\n -~]|[\t\r\n -~]\0", start):
        guess = "UTF-16LE" if start[0] else "UTF-16BE"
        raise UserError(f"{place}: line 1: byte 0x00 in column {start.index(0) + 1}: UTF-16 without its mark? Convert "
                        f"it: iconv -f {guess} -t UTF-8 OLD > NEW")
    lines: Iterable[bytes | str] = io.TextIOWrapper(file, "utf-16", newline="\n") if is_utf_16 else file
    try:
        for line in lines:
            number += 1
            yield (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff")  # files may be joined
    except UnicodeDecodeError as error:
        advice = "save it as UTF-8, or: iconv -f WINDOWS-1252 (or what it is) -t UTF-8 OLD > NEW"
        if error.reason in ("truncated data", "unexpected end of data"):
            advice = CUT + f", or, if it is whole: {advice}" * (not is_utf_16)
        elif not is_utf_16 and re.search(rb"[\0-\x08\x0e-\x1f]", error.object + file.peek(512)):
            is_named_gz = place.lower().endswith(".gz") and not isinstance(file.raw, gzip.GzipFile)
            advice = f"it is no text{' and no gzip' * is_named_gz}: download it again, or use {', '.join(KINDS)}"
        raise UserError(f"{place}: {'after ' * is_utf_16}line {number}: not {'UTF-16' if is_utf_16 else 'UTF-8'}: byte "
                        f"0x{error.object[error.start]:02x} in column {error.start + 1}; {advice}") from error


def _json_rows(place: str, head: list[str], lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """One object a line; or one value, read whole: a list, or an object alone or over many lines."""
    first, second, *_ = [line.strip() for line in head if line.strip()] + ["", ""]
    if not _is_whole(first, second):
        yield from ((f"line {number}", parse_json(line.rstrip(), is_end=not line.endswith("\n")))
                    for number, line in enumerate(chain(head, lines), 1) if line.strip())
        return
    rows = _listed(parse_json("".join(chain(head, lines)).rstrip(), is_end=True))
    if isinstance(rows, BadRow):
        raise UserError(f"{place}: {rows}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _is_whole(first: str, second: str) -> bool:
    """Whether a JSON text that begins with these lines is one value, and not a row a line."""
    if isinstance(parse_json(first), BadRow):  # it goes on, unless the next line begins an object too
        return first.startswith(("{", "[")) and not (first.startswith("{") and second.startswith("{"))
    return not second


def parse_json(text: str, is_end: bool = False) -> Any:
    """The value of a JSON text, or a BadRow. Numbers stay as they are written, NaN is null. is_end: of its file."""
    try:
        return _JSON.decode(text)
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        is_cut = is_end and text != "" and (error.pos >= len(text) or error.msg.startswith("Unterminated"))
        return BadRow(f"cannot be read as JSON: {error.msg}: " + f"line {error.lineno} " * ("\n" in text)
                      + f"column {error.colno}" + f"; {CUT}" * is_cut)


def split_of(name: str) -> str | None:
    """The split that a name such as Train, validation or test_sft means."""
    return SPLIT_NAMES.get(name.strip().lower().split("_")[0])


def _listed(value: Any) -> Any:
    """The rows of a JSON value: a list of them, perhaps under a key such as data, or under train and val; or what
    pandas writes, in three ways. A BadRow where only some lists are under such keys: none may be lost."""
    if not isinstance(value, dict):
        return value if isinstance(value, (list, BadRow)) else [value]
    if all(key.isdigit() for key in value):
        return list(value.values())
    texts = {key.strip().lower() for key, each in value.items() if not isinstance(each, (dict, list))}
    if texts & {*QUESTIONS} and texts & {*ANSWERS}:
        return [value]
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and isinstance((rows or [{}])[0], dict)}
    wrapped = {key: rows for key, rows in lists.items()
               if key.strip().lower() in WRAPPERS or split_of(key) or rows and not rows[0].keys().isdisjoint(TALKS)}
    rest = [key for key, rows in lists.items() if rows and key not in wrapped]
    if rest and any(wrapped.values()):
        return BadRow(f"rows under {', '.join(f'{key!r:.60}' for key in lists)}, of which {rest[0]!r:.60} is no known "
                      "name; put them into one list, or under train and val")
    if wrapped and not rest:
        return [{"split": key, **row} if split_of(key) and isinstance(row, dict) else row
                for key, rows in wrapped.items() for row in rows]
    names, table = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(table, list) and all(
            isinstance(row, list) and len(row) == len({*map(str, names)}) for row in table):
        return [dict(zip(map(str, names), row)) for row in table]
    first, *others = value.values()
    if others and isinstance(first, dict) and all(key.isdigit() for key in first) and all(
            isinstance(each, dict) and each.keys() == first.keys() for each in others):
        return [{name: column[key] for name, column in value.items()} for key in first]
    return [value]


def _csv_rows(place: str, head: list[str], lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The first line names the columns. They are separated as a line such as sep=; says, else as they look."""
    csv.field_size_limit(sys.maxsize)
    records = _csv_records(place, head, lines)
    first, header = next(records, (0, []))
    _refuse_twice(f"{place}: line {first}", header)
    for line, fields in records:
        if fields != header:  # again, where files were joined
            yield f"line {line}", dict(zip(header, fields)) if len(fields) == len(header) else BadRow(
                f"expected {len(header)} columns as in the first line, found {len(fields)}")


def _refuse_twice(place: str, names: list[str]) -> None:
    """Raise UserError where two columns have one name; any number may have none."""
    count = Counter(filter(None, map(str.strip, names)))
    if twice := [name for name in count if count[name] > 1]:
        raise UserError(f"{place}: two columns {twice[0]!r:.60}; give each a name of its own")


def _csv_records(place: str, head: list[str], lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, fields) of every record that is not empty."""
    filled = list(dropwhile(lambda line: not line.strip(), head))
    if separator := re.fullmatch(r"sep=(.)\s*", "".join(filled[:1])):
        filled = filled[1:]
    before, line = len(head) - len(filled), 0
    try:
        delimiter = separator[1] if separator else max(",;\t|", key=lambda each: len(next(
            csv.reader(filled[:1], delimiter=each, skipinitialspace=True), [])))
        if delimiter == "|" and re.fullmatch(r"[\s|:-]*-[\s|:-]*", "".join(filled[1:]).strip()):  # Markdown
            for line, text in enumerate(chain(filled, lines), before + 1):
                if text.strip() and line != before + len(filled):  # the rule below the names
                    cells = re.split(r"(?<!\\)\|", text.strip().removeprefix("|").removesuffix("|"))
                    yield line, [cell.strip().replace("\\|", "|") for cell in cells]
            return
        # A blank in front of a quote is none of the field; others are, and hidden from the reader by what no text has
        blank = re.compile(rf'(^|{re.escape(delimiter)}) (?! *")')
        reader = csv.reader((blank.sub("\\1\ud800", text) for text in chain(filled, lines)), delimiter=delimiter,
                            strict=True, skipinitialspace=delimiter != " ")
        while True:
            line = before + reader.line_num + 1
            if record := next(reader):
                yield line, [field.replace("\ud800", " ") for field in record]
    except StopIteration:
        return
    except csv.Error as error:
        reason = "in the row that begins here a quote is not closed, or one inside is not doubled"
        if "new-line" in str(error):
            reason = "a CR alone, outside quotes; where lines end with it: tr '\\r' '\\n' < OLD > NEW"
        raise UserError(f"{place}: line {max(line, 1)}: {str(error).split(' - ')[0]}: {reason}") from error


def _parquet_rows(place: str, file: Any) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    with errors_at(f"{place}: not a readable Parquet file", pyarrow.ArrowException, UnicodeDecodeError):
        table = pyarrow.parquet.ParquetFile(file)
        _refuse_twice(place, table.schema_arrow.names)
        for batch in table.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _hub_rows(name: str, subset: str | None = None, split: str | None = None, **how: Any) -> Iterator[tuple[str, Any]]:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries are reported once, below
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with errors_at(f"{name}: not a local file, and loading it from the Hugging Face hub failed", Exception,
                   advice="; check the name and the network, pass a local file with --dataset FILE, or try "
                   "./start_instruct_training.sh demo"):  # the hub client fails in as many ways as networks do
        try:
            rows = datasets.load_dataset(name, subset, split=split or "train", **how)
        except ValueError as error:
            choice = re.search(r"(configs|Available|one of|splits):? \[(.*?)\]", str(error))
            if not choice:
                raise
            flag = "--subset" if choice[1] in ("configs", "Available") else "--split"
            raise UserError(f"{name}: choose with {flag}, one of {choice[2]}") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
