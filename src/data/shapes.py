"""What a row means: the Alpaca columns instruction, input and output, and perhaps split, become an Example."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.rows import BadRow, open_rows
from errors import UserError, errors_at

COLUMNS = ("instruction", "input", "output")
SPLITS = ("train", "val")
LONGEST_BLANK = 100_000  # the tokenizer fails from about a million blanks in a row on
_BLANK = re.compile(rf"\s{{{LONGEST_BLANK}}}")


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
    with errors_at(dataset):
        columns, rows = open_rows(dataset)
        missing = [name for name in COLUMNS if columns is not None and name not in columns]
        if missing:
            raise UserError(f"{dataset}: no column {', '.join(map(repr, missing))} "
                            f"(found: {', '.join(map(repr, columns or []))})")
        for place, row in rows:
            yield place, row if isinstance(row, BadRow) else example_of(row)


def example_of(row: Any) -> Example | BadRow:
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
