"""What to do about files, folders and rows that cannot be read here."""

import glob
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from errors import UserError

CUT = "it is cut off or damaged: copy or download it again"
# First bytes: of zip, also in .xlsx and .docx, old .xls, PDF, Arrow, SQLite; of zstd, bzip2, xz, 7z, rar, lz4
_DOCUMENTS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"%PDF", b"ARROW1", b"SQLite format")
_PACKED = (b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18")


def refuse_foreign(place: str, start: bytes) -> None:
    """Raise UserError where these first bytes are of a file of another program."""
    if start.startswith(_DOCUMENTS):
        raise UserError(f"{place}: a document or an archive, no text; save it as CSV, or unpack it first")
    if start.startswith(_PACKED):
        raise UserError(f"{place}: packed, but not by gzip; unpack it first")


def for_folder(folder: str, kinds: Sequence[str]) -> str:
    """Which patterns name the files below a folder, but those about a dataset."""
    below = f"{glob.escape(folder.rstrip('/'))}/**/*"
    kind = rf"(?<!/state)(?<!/dataset_info)({'|'.join(map(re.escape, kinds))})(\.gz)?$"
    found = (re.search(kind, name, re.IGNORECASE) for name in islice(glob.iglob(below, recursive=True), 10_000))
    patterns = dict.fromkeys(shlex.quote(below + match[0]) for match in found if match)
    return f"for all in it: --dataset {' '.join(patterns)}" if patterns else f"nor is one of {', '.join(kinds)} in it"


def names_of(row: Iterable[str]) -> str:
    """The names of a row's columns, quoted: at most 20 of them."""
    first, *more = (f"{name!r:.60}" for name in row) if row else ["none"]
    return ", ".join([first, *more[:19]]) + f" and {len(more) - 19:,} more" * (len(more) > 19)


def for_messages(row: Mapping[str, Any]) -> str:
    """What to say where a column is a list of messages of several roles."""
    for name, value in row.items():
        items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
        if len({str(role) for item in items if (role := item.get("role", item.get("from"))) is not None}) > 1:
            return f"{name!r:.60} is a list of messages; say so: --columns {shlex.quote(f'messages={name}')}"
    return ""


def for_columns(row: Mapping[str, Any], missing: int) -> str:
    """What to do about a row that lacks so many of the two columns, question and answer."""
    if messages := for_messages(row):
        return messages
    advice, names = [], [str(name).strip().lower() for name in row]
    nested = [name for name, value in row.items()
              if missing == 2 and isinstance(value[0] if value and isinstance(value, list) else value, dict)]
    is_data = missing == 2 and any(re.search(r"[.?!]$|(\S+\s+){4}", name) for name in names)
    if len(row) - len(nested) >= missing and not is_data:
        advice.append("say which it is: --columns instruction=NAME output=NAME")
    if nested:
        advice.append(f"its rows seem to be under {names_of(nested[:3])}: write them as a list of their own, each with "
                      "its question and its answer")
    elif missing == 2 and "text" not in names:
        advice.append("the first line of a table, and each row of JSON, has to name the columns")
    if "text" in names or missing == 2 and "chosen" in names:
        advice.append("where a text is a whole conversation, or one message of it, take a variant with messages or "
                      "pairs, such as philschmid/guanaco-sharegpt-style")
    return "; ".join(advice)
