"""Rows of files, pipes and Hugging Face datasets, one at a time, each with its place.

Nothing in here knows what a row means. The readers are our own because `datasets`, which serves the hub, turns the CSV
text null into nothing, takes lines that are not UTF-8, and loses the numbers of lines.
"""

import codecs
import csv
import glob
import gzip
import io
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, NamedTuple

from data.values import TALKS, BadRow, is_pair, is_talk, parse_json, plain, split_of
from errors import UserError, errors_at

STDIN = "-"
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")  # each also as .gz
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# in the first bytes of archives, and of UTF-16 without its mark
_CONTROL = re.compile(rb".{0,15}?[\1-\x08\x0e-\x1f]|.{0,511}?\0", re.DOTALL)
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # how a file and a stream of Arrow begin
_LFS = b"version https://git-lfs"
_NO_TEXT = ("save it as UTF-8, or convert it: iconv -f WINDOWS-1252 (or UTF-16LE, or what it is) -t UTF-8 OLD > NEW. "
            "An archive other than .gz has to be unpacked, a document saved as CSV, a file that is cut copied again")


class Source(NamedTuple):
    name: str
    rows: Iterator[tuple[str, Any]]  # (place such as "line 3", the row or a BadRow)


def open_sources(names: Iterable[str], hub: Mapping[str, Any]) -> list[Source]:
    """The files that names and patterns stand for, each once, and datasets of the hub, which it loads as hub says.
    Raises UserError when one is missing or broken, here or while its rows are read."""
    found: dict[str, str] = {}
    for name in names:
        is_pattern = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(filter(os.path.isfile, glob.glob(name, recursive=True))) if is_pattern else sorted(
            glob.glob(f"{glob.escape(name)}/data-*.arrow")) or [name]  # a folder of save_to_disk
        if not matches:
            raise UserError(f"{name}: no file matches")
        found |= {os.path.realpath(match): match for match in matches}
    return [Source("standard input" if name == STDIN else name, _rows(name, hub)) for name in found.values()]


def _rows(name: str, hub: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if name == STDIN or os.path.exists(name):
        if os.path.isdir(name):
            parts = glob.glob(f"{glob.escape(name)}/*/data-*.arrow")  # save_to_disk of several splits
            advice = ("name one of its splits, such as " + os.path.dirname(parts[0]) if parts else
                      f"name its files, or a pattern such as '{name}/train*.jsonl'")
            raise UserError(f"{name}: a folder; {advice}")
        if any(hub.values()):
            raise UserError(f"{name}: --split, --subset, --revision and --streaming are for datasets of the hub")
        return _file_rows(name)
    is_local = name.lower().endswith((*KINDS, ".gz", ".txt")) or os.path.isdir(os.path.dirname(name))
    if is_local or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name or 'an empty name'}: no such file" + "; download it, or name a dataset of the hub as "
                        "OWNER/NAME" * ("://" in name))
    return _numbered(_hub_rows(name, **hub))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _file_rows(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file or pipe. What its kind does not say, its content does."""
    place, kind = "standard input" if name == STDIN else name, Path(name.lower().removesuffix(".gz")).suffix
    with (errors_at(place, BadRow), sys.stdin.buffer if name == STDIN else open(name, "rb") as opened,
          errors_at(place, EOFError, zlib.error, advice="; copy or download it again if it is damaged")):
        file: Any = opened
        if zipped := file.peek(2).startswith(b"\x1f\x8b"):
            file = io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
        if file.peek(len(_LFS)).startswith(_LFS):
            raise BadRow("a pointer of git LFS, not the file itself; run git lfs pull in its folder")
        if kind == ".parquet" or file.peek(6).startswith((b"PAR1", *_ARROW)):
            begin, is_pipe = file.peek(6)[:6], zipped or not os.path.isfile(name)
            yield from _numbered(_arrow_rows(place, io.BytesIO(file.read()) if is_pipe else name, begin))
            return
        lines, ahead = tee(_lines(file))
        first, second, *_ = [*islice(filter(str.strip, ahead), 2), "", ""]  # that are not blank
        del ahead  # else all that is read stays in memory
        is_json = kind in KINDS[:3] or first.lstrip().startswith(("{", "[")) and (  # a table's column may be [output]
            kind not in KINDS or first.strip() in "[{" or not isinstance(parse_json(first.strip()), BadRow))
        yield from _json_rows(first, second, lines) if is_json else _csv_rows(first, lines)


def _lines(file: io.BufferedReader) -> Iterator[str]:
    """The lines of a text. Raises BadRow naming the first byte that is none of it."""
    number, is_utf_16 = 0, file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    lines: Iterable[bytes | str] = io.TextIOWrapper(file, "utf-16", newline="\n") if is_utf_16 else file
    try:
        for number, line in enumerate(lines, 1):
            if isinstance(line, bytes):
                if number == 1 and (control := _CONTROL.match(line)):
                    raise UnicodeDecodeError("utf-8", line, control.end() - 1, control.end(), "no text")
                line = line.decode()
            yield line.lstrip("\ufeff")  # files may be joined
    except UnicodeDecodeError as error:
        raise BadRow(f"{'after ' * is_utf_16}line {number}: not {'UTF-16' if is_utf_16 else 'UTF-8'}: byte "
                     f"0x{error.object[error.start]:02x} in column {error.start + 1}; {_NO_TEXT}") from error


def _json_rows(first: str, second: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """One object a line; or values that are read whole: a list, or objects over many lines or on one."""
    starts = first.lstrip()[:1] + second.lstrip()[:1]
    is_cut = starts == "{{" and not first.rstrip().endswith(("[", "{"))  # an object on a line of its own, not whole
    goes_on = starts.startswith(("{", "[")) and not is_cut and isinstance(parse_json(first.strip()), BadRow)
    if not goes_on and (second or not first):
        yield from ((f"line {at}", parse_json(line.rstrip())) for at, line in enumerate(lines, 1) if line.strip())
        return
    values = parse_json("".join(lines).rstrip(), is_one=False)
    if isinstance(values, BadRow):
        raise values
    is_rows = len(values) > 1 and {*map(type, values)} == {dict}
    yield from _numbered(values if is_rows else chain.from_iterable(map(_listed, values)))


def _listed(value: Any) -> list[Any]:
    """The rows of a JSON value: a list of them, perhaps under a key such as data, or lists under train and val; or what
    pandas and datasets write by columns, or by numbers. Raises BadRow where several lists have other keys: not all of
    them may be for training."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    columns, kinds = list(value.values()), {*map(type, value.values())}
    if kinds == {dict} and (all(map(str.isdigit, value)) or all(map(is_pair, columns))):
        return columns
    if kinds == {dict} and columns[0] and all(map(str.isdigit, columns[0])) and all(
            column.keys() == columns[0].keys() for column in columns):
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    if is_pair(value) and kinds == {list} and len({*map(len, columns)}) == 1 and not any(map(is_talk, columns)):
        return [dict(zip(value, row)) for row in zip(*columns)]
    header, rows = value.get("columns"), value.get("data")
    if not is_pair(value) and isinstance(header, list) and {*map(type, header)} == {str} and isinstance(
            rows, list) and all(isinstance(row, list) and len(row) == len(header) for row in rows):
        _refuse_twice(header)
        return [dict(zip(header, row)) for row in rows]
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    is_row = is_pair(value) or any(
        rows[0].keys() >= {"role", "content"} or rows[0].keys() >= {"from", "value"} or
        plain(key) in TALKS and rows[0].keys().isdisjoint(TALKS) for key, rows in lists.items())
    if is_row or not lists:
        return [value]
    if len(lists) > 1 and not all(map(split_of, lists)):
        raise BadRow(f"rows under {', '.join(f'{key!r:.60}' for key in lists)}; put those to train on into one list, "
                     "or under train and val")
    return [{"split": key, **row} if split_of(key) and isinstance(row, dict) else row
            for key, rows in lists.items() for row in rows]


def _csv_rows(first: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The first line names the columns. They are separated as a line such as sep=; says, else as they look."""
    csv.field_size_limit(sys.maxsize)
    separator = re.fullmatch(r"sep=(\S|\t)\s*", first)
    header, line = list[str](), 1  # where the row begins
    try:
        delimiter = separator[1] if separator else max(
            ",;\t" if re.search(r"^\||[,;\t]", first) else "|",  # names may have bars, so has Markdown
            key=lambda each: len(next(csv.reader([first], delimiter=each, skipinitialspace=True), [])))
        # A blank in front of a quote is none of the field; others are, and hidden from the reader by what no text has
        blank = re.compile(rf'(^|{re.escape(delimiter)}) (?! *")')
        reader = csv.reader((blank.sub("\\1\ud800", text) for text in lines), delimiter=delimiter,
                            strict=True, skipinitialspace=True)
        for hidden in reader:
            fields = [field.replace("\ud800", " ") for field in hidden]
            if not header:
                if "".join(fields).strip() not in ("", "sep="):  # as of a blank line, or one such as sep=;
                    header = fields
                    _refuse_twice(header, f"line {line}: ")
            elif (fields[1:] or "".join(fields).strip()) and fields != header:  # it comes again where files were joined
                while len(fields) > len(header) and not fields[-1]:
                    fields.pop()
                yield f"line {line}", dict(zip(header, fields)) if len(fields) == len(header) else BadRow(
                    f"expected {len(header)} columns as in the first line, found {len(fields)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadRow(f"line {line}: {str(error).split(' - ')[0]}: in the row that begins here a quote is not closed, "
                     "one inside is not doubled, or a line ends with CR alone") from error


def _refuse_twice(names: list[str], where: str = "") -> None:
    """Raise BadRow where two columns have one name; any number may have none."""
    for name, count in Counter(map(str.strip, names)).items():
        if name and count > 1:
            raise BadRow(f"{where}two columns {name!r:.60}; give each a name of its own")


def _arrow_rows(place: str, file: Any, begin: bytes) -> Iterator[Any]:
    """Of Parquet, and of what datasets' save_to_disk and pandas' to_feather write."""
    import pyarrow.ipc
    import pyarrow.parquet

    kind = "Arrow" if begin.startswith(_ARROW) else "Parquet"
    with errors_at(f"{place}: not a readable {kind} file", pyarrow.ArrowException, OverflowError, ValueError):
        if kind == "Parquet":
            table = pyarrow.parquet.ParquetFile(file)
            names, batches = table.schema_arrow.names, table.iter_batches(1000)
        else:
            source = pyarrow.memory_map(file) if isinstance(file, str) else file
            if begin == _ARROW[0]:
                table = pyarrow.ipc.open_file(source)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                table = batches = pyarrow.ipc.open_stream(source)
            names = table.schema.names
        _refuse_twice(names)
        for batch in batches:
            batch.validate(full=True)  # else a damaged one ends the process
            for begins in range(0, batch.num_rows, 1000):
                yield from batch.slice(begins, 1000).to_pylist()


def _hub_rows(name: str, subset: str | None = None, split: str | None = None, **how: Any) -> Iterator[Any]:
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
            if not (choice := re.search(r"(configs|Available|one of|splits):? \[(.*?)\]", str(error))):
                raise
            flag = "--subset" if choice[1] in ("configs", "Available") else "--split"
            raise UserError(f"{name}: choose with {flag}, one of {choice[2]}") from error
        yield from rows
