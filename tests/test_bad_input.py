"""Whatever file it is given, preparation succeeds or says in one line which file, where in it, and why."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import cli
import helpers
import prepare_instruct_dataset
from data.shards import MANIFEST
from data_files import HARD_ROWS, lines, listed, parquet, row
from data_files import table as table_of
from errors import UserError


def table(*rows: str, header: str = "instruction,input,output") -> bytes:
    return "".join(f"{line}\n" for line in (header, *rows)).encode()


def twice() -> bytes:
    """A Parquet file with two columns of one name."""
    buffer, names = io.BytesIO(), ["instruction", "output", "output"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names), buffer)
    return buffer.getvalue()


GOOD = [row(number) for number in range(12)]
LINES, LISTED, TABLE = lines(*GOOD), listed(*GOOD), table(*(f"Question {n},,Answer {n}" for n in range(12)))
PLAIN = {"a.jsonl": LINES, "a.json": LISTED, "a.csv": TABLE}
DEEP = b"[" * 100_000 + b"]" * 100_000
LONG_NUMBER = b'{"instruction": ' + b"9" * 5000 + b', "input": "", "output": "x"}\n'
BLANKS = "a" + " \n" * 600_000 + "b"
NO_JSON, NO_PARQUET = "cannot be read as JSON: .*", "not a readable Parquet file"
NOTHING = r"nothing to train on \(0 read, 0 kept; dropped: 0 empty output, 0 exact repeat, 0 bad row\)$"
NO_TEXT = r".*; save it as UTF-8, or convert it: iconv -f .* -t UTF-8 OLD > NEW\. An archive other than \.gz has to be "
CUT = "copy or download it again if it is damaged$"

# file name, its bytes, what the one line must say after the name (a regular expression)
BAD: dict[str, tuple[str, bytes, str]] = {
    **{f"no rows in {name} {text!r}": (name, text, NOTHING) for name, text in (
        ("a.json", b" \n\n "), ("a.jsonl", b""), ("a.csv", b""), ("a.json", b"[]"), ("a.csv", table()))},
    "no columns": ("a.json", b"{}", r"row 1: no column for the .* and no column for the output \(found: none\)"),
    "one kept": ("a.jsonl", lines(row(), row(), row(output="")), r"train and val need a prompt each, and there is only "
                 r"one \(3 read, 1 kept; dropped: 1 empty output, 1 exact repeat, 0 bad row\)$"),
    "one question": ("a.jsonl", lines(row(output="a"), row(output="b")), r"train and val need a prompt each, and "
                     r"there is only one: all instructions are the same, with the same input \(2 read, 2 kept; "),
    "only test": ("a.jsonl", lines(*(row(n, split="test") for n in range(9))), r"nothing .*9 read, 0 kept; .* 9 test "
                  r"split\); --columns split= ignores that column$"),
    **{f"{name} of another program": (name, data, r"line \d: not UTF-8: byte 0x.. in column \d+" + NO_TEXT)
       for name, data in (("a.xlsx", b"PK\3\4..."), ("a.jsonl", b"PK\3\4"), ("a.pdf", b"%PDF-1.4\n%\xe2\xe3"),
                          ("a.bin", b"\1\0\2"), ("a.xls", b"\xd0\xcf\x11\xe0"), ("a.db", b"SQLite format 3\0"),
                          ("a.png", b"\x89PNG\r\n\x1a\n\0\0"), ("a.jsonl", b"Q\xf8\0" * 9))},
    **{f"{name}, packed": (name, data, r"line \d: not UTF-8: byte 0x.. in column \d+" + NO_TEXT) for name, data in (
        ("a.jsonl.bz2", bz2.compress(LINES)), ("a.jsonl", lzma.compress(LINES)), ("a.csv.zst", b"\x28\xb5\x2f\xfd"),
        ("a.jsonl.gz", gzip.compress(b"\x28\xb5\x2f\xfd...")), ("no.jsonl.gz", b"Q\xf8\0" * 9))},
    "no names": ("a.csv", table("Who is it?,It is me", header="What is it?,It is that"),
                 r"line 2: no column .* 'It is that'\); say which .*\. The first line of a table, and each row of"),
    "not JSON, in a list": ("a.json", LISTED.replace(b'"Answer 4"', b"Answer 4"), NO_JSON + "line 6 column 54$"),
    "not JSON, line": ("a.jsonl", LINES + b"hello\n", r"line 13: cannot be read as JSON: Expecting value: column 1 \("),
    "cut, line": ("a.jsonl", LINES[:-9], r"line 12: cannot be read as JSON: Unterminated .*: column 55 \("),
    "first line cut": ("a.jsonl", lines(row())[:-2] + b"\n" + LINES, "line 1: " + NO_JSON),
    "first line cut after a comma": ("a.jsonl", b'{"instruction": "a",\n' + LINES, "line 1: " + NO_JSON),
    "rows under an unknown key": ("a.json", json.dumps({"train": GOOD, "held_out": [row(99)]}).encode(),
                                  "rows under 'train', 'held_out'; put those to train on into one list, or under"),
    "rows not to be trained": ("a.json", json.dumps({"accepted": GOOD, "rejected": [row(99)]}).encode(),
                               "rows under 'accepted', 'rejected'; put those to train on into one list, or under"),
    "two columns of one name": ("a.csv", table("a,b,c", header="instruction,output,output "),
                                "line 1: two columns 'output'; give each"),
    "two columns of one name, Parquet": ("a.parquet", twice(), "two columns 'output'; give each"),
    "not JSON, first line": ("a.jsonl", b"{'instruction': 1}\n" + LINES, "line 1: " + NO_JSON),
    "many objects over many lines": ("a.json", json.dumps(row(), indent=1).encode() * 2, NO_JSON + "line 5 column 2$"),
    "list not closed": ("a.json", LISTED.rstrip()[:-1], NO_JSON + r"line 13 column \d+$"),
    "UTF-16 list without mark": ("a.json", LISTED.decode().encode("utf-16-le"),
                                 "line 1: not UTF-8: byte 0x00 in column 2" + NO_TEXT),
    "UTF-16 table without mark": ("a.csv", TABLE.decode().encode("utf-16-be"),
                                  "line 1: not UTF-8: byte 0x00 in column 1" + NO_TEXT),
    "UTF-16 cut": ("a.jsonl", LINES.decode().encode("utf-16")[:-1], r"after line \d+: not UTF-16" + NO_TEXT),
    "gzip cut": ("a.jsonl.gz", gzip.compress(LINES)[:-9], r".*end-of-stream.*; " + CUT),
    "gzip damaged": ("a.jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8), r".*CRC.*; " + CUT),
    "Windows text": ("a.csv", TABLE + "prix,,10 €\n".encode("cp1252"),
                     r"line 14: .*byte 0x80 in column 10; .*iconv -f "),
    "0xff in a line": ("a.jsonl", LINES.replace(b"r 3", b"\xff"), "line 4: not UTF-8: byte 0xff in column 60"),
    "0xff in a quoted field": ("a.csv", table('"a', 'b",,c').replace(b'b"', b'\xff"'), "line 3: not UTF-8: byte 0xff"),
    "cut inside a character": ("a.jsonl", LINES + '{"instruction": "é'.encode()[:-1],
                               rf"line 13: not UTF-8{NO_TEXT}unpacked, .*, a file that is cut copied again"),
    "no column, table": ("a.csv", table("x,y", header="instruction,reply"), r"line 2: no column for the output "
                         r"\(found: 'instruction', 'reply'\); say which it is: --columns instruction=NAME output=NAME"),
    "no column, parquet": ("a.parquet", parquet({"text": "x"}), r"row 1: no column for the instruction and no "
                           r"column for the output \(found: 'text'\).*such as philschmid/guanaco-sharegpt-style$"),
    "a list": ("a.jsonl", lines(row(), row(output=["a", "b"])), r"line 2: column 'output' must be text, found \['a', "),
    "row is a list": ("a.json", listed(row(), ["x", "", "y"]), r"row 2: expected an object .*found \['x', '', 'y'\]"),
    "nested deeply, list": ("a.json", DEEP, "nested too deeply"),
    "nested deeply, line": ("a.jsonl", lines(row()) + DEEP, "line 2: nested too deeply"),
    "a million blanks": ("a.json", listed(row(), row(output=BLANKS)), r"row 2: column 'output' has 100,000 blanks"),
    "lone surrogate": ("a.jsonl", lines(row(), row(output="a\ud800b")), r"line 2: column 'output' .*surrogate"),
    "unknown split": ("a.jsonl", lines(row(split="val"), row(1, split="b")), "line 2: column 'split' must be train, "
                      "val or test, found 'b'; --columns split= ignores that column$"),
    "too many fields": ("a.csv", TABLE + b"a,b,c,d\n", r"line 14: expected 3 columns .* found 4"),
    "quote not closed": ("a.csv", TABLE + b'a,,"b\n' + b"c,,d\n" * 9, "line 14: unexpected end .*quote is not clos"),
    "closed by the next": ("a.csv", table('a,,"two', 'lines"', 'b,,"c', 'd,,"e"'), "line 4: .*quote is not closed"),
    "lines that end with CR": ("a.csv", TABLE.replace(b"\n", b"\r"), r"line 1: .*, or a line ends with CR alone$"),
    "text after a quote": ("a.csv", table('a,,"b"c'), r"line 2: .*expected after"),
    "Parquet cut": ("a.parquet", parquet(*GOOD)[:-30], NO_PARQUET),
    "Parquet with a date that Python lacks": ("a.parquet", parquet({**row(), "until": date(9999, 12, 31)}).replace(
        (date(9999, 12, 31) - date(1970, 1, 1)).days.to_bytes(4, "little"), b"\xff\xff\xff\x7f"), NO_PARQUET),
    "Parquet not UTF-8": ("a.parquet", parquet(row()).replace(b"Answer", b"Answe\xff"), NO_PARQUET),
    "a folder": ("folder.jsonl", b"", r"a folder; name its files, or a pattern such as '.*/train\*\.jsonl'$"),
    "nothing there": ("missing.jsonl", b"", r"no such file"),
    "name that a terminal would obey": ("\x1b[2J\n\u202e.jsonl", lines(7), r"row 1: expected an object"),
}


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    if name.startswith("folder"):
        path.mkdir()
    elif not name.startswith("missing"):
        path.write_bytes(content)
    return path


def prepare(data: Path, *flags: object) -> dict[str, Any]:
    return helpers.prepare(data, data.parent / "out", "--num_proc", 1, "--val_fraction", 0.5, *flags)


# Where --skip_bad is offered: never for the first row, which the others may be like, an encoding, or a broken file
SINGLE_ROWS = ("not JSON, line", "cut, line", "a list", "row is a list", "nested deeply, line",
               "a million blanks", "lone surrogate", "too many fields")
BROKEN = ("list not closed", "0xff in a line", "quote not closed", "no column, table",
          "Parquet not UTF-8")  # --skip_bad does not help


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_main, case):
    name, content, expected = BAD[case]
    data = write(tmp_path, name, content)
    for flags in ([], ["--skip_bad"])[:1 + (case in BROKEN)]:
        said = run_main(prepare_instruct_dataset.main, "--dataset", data, "--output_dir", tmp_path / "out",
                        "--num_proc", 1, "--val_fraction", 0.5, *flags).refusal()
        assert re.match(re.escape(f"error: {cli.printable_line(data)}: ") + expected, said)
        assert said[:-1].isprintable() and ("--skip_bad" in said) == (case in SINGLE_ROWS)
        assert not (tmp_path / "out" / MANIFEST).exists()


FINE: dict[str, tuple[str, bytes]] = {
    "JSON lines of another kind": ("a.log", LINES),
    **{f"CRLF {name}": (name, data.replace(b"\n", b"\r\n")) for name, data in PLAIN.items()},
    "BOM JSON lines in .json": ("a.json", codecs.BOM_UTF8 + b"\n" + LINES),
    "empty lines between": ("a.jsonl", LINES.replace(b"\n", b"\n\n \n")),
    "no newline at the end": ("a.jsonl", LINES.rstrip()),
    "more columns": ("a.jsonl", lines(*({**each, "id": 7, "split": None} for each in GOOD))),
    "whole number of 5,000 digits": ("a.jsonl", lines(*GOOD[:-1]) + LONG_NUMBER),
    "NUL in escapes": ("a.jsonl", lines(*GOOD[:-1], row(output="a\0b"))),
    "columns without a name": ("a.csv", table(*(f"Question {n},,Answer {n},," for n in range(12)),
                                              header="instruction,input,output,,")),
    "empty lines in a table": ("a.csv", TABLE.replace(b"\n", b"\n\n")),
    "empty rows above a table": ("a.csv", b",,\n\n" + TABLE),
    "one column as pandas writes it": ("a.json", json.dumps({"messages": {str(n): [
        {"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}] for n in range(12)}}).encode()),
    "a split that is none": ("a.jsonl", lines(*(row(n, split="abc"[n % 3]) for n in range(12)))),
    "millions of letters, line": ("a.jsonl", lines(*GOOD[:-1], row(output="word " * 600_000))),
    "millions of letters, list": ("a.json", listed(*GOOD[:-1], row(output="a" * 1_000_000))),
}


@pytest.mark.parametrize("case", FINE)
def test_harmless_variants_are_read(tmp_path, case):
    manifest = prepare(write(tmp_path, *FINE[case]))
    assert manifest["total_examples"] == 12 == manifest["train_examples"] + manifest["val_examples"]


@pytest.mark.parametrize("name, content, bad", [
    ("a.jsonl", lines(*GOOD, 7, row(output={"a": 1}), {}, row(output="\ud800"), row(99, split="val"), None)
     + b"{\n" + DEEP, 8),
    ("a.jsonl", lines(row())[:-2] + b"\n" + LINES, 1),
    ("a.json", listed(*GOOD, 7, row(output=[1, 2]), {}), 3),
    ("a.csv", TABLE + b"a\na,b,c,d\n", 2),
    ("a.parquet", parquet(*({**each, "split": None} for each in GOOD), row(output="\0" * 7, split="val")), 1),
], ids=["lines", "first line", "list", "table", "parquet"])
def test_skip_bad_drops_and_counts(tmp_path, name, content, bad):
    data = write(tmp_path, name, content)
    manifest = prepare(data, "--skip_bad")
    assert manifest["dropped"] == {"empty_output": 0, "exact_repeat": 0, "bad_row": bad}
    assert manifest["train_examples"] + manifest["val_examples"] == 12 == manifest["total_examples"] - bad
    with pytest.raises(UserError, match=f"{name}.*(--skip_bad drops such rows|--columns split= ignores that column|"
                       "line 1: cannot be read as JSON)"):
        prepare(data)


PIECES = (b"", b'"', b"{", b"[", b"]", b",", b"\n", b"\r", b"\0", b"\\ud800", b"\xed\xa0\x80", b"null", b"-1e999",
          b"NaN", b"\xf0\x9f", codecs.BOM_UTF8, codecs.BOM_UTF16_LE)
ORIGINALS = {
    "json": json.dumps(HARD_ROWS, indent=1, ensure_ascii=False).encode(), "jsonl": lines(*HARD_ROWS),
    "csv": table_of(HARD_ROWS).encode(), "parquet": parquet(*HARD_ROWS),
}


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Cut a piece out and put another in, or flip a bit, as disks, editors and transfers do."""
    at, length = chance.randrange(len(data) + 1), chance.choice([0, 1, 40, len(data)])
    flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in data[at:at + 1])
    piece = chance.choice([*PIECES, chance.randbytes(1), chance.randbytes(8), data[max(0, at - 200):at]])
    before, after = data[:at], data[at + length:]
    return chance.choice([before + flipped + data[at + 1:], before + piece * chance.choice([1, 1, 50]) + after])


@pytest.mark.parametrize("seeds", [range(63), pytest.param(range(1000, 1250), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("kind", ORIGINALS)
def test_mutants_are_prepared_or_refused(tmp_path, monkeypatch, kind, seeds):
    monkeypatch.setattr("os.fsync", lambda _: None)  # nothing here is about a power cut, and fsync takes long
    original, succeeded = ORIGINALS[kind], 0
    for seed in seeds:
        chance, mutant = random.Random(f"{kind} {seed}"), original
        for _ in range(chance.randint(1, 3)):
            mutant = mutate(mutant, chance)
        path = write(tmp_path, f"{seed}.{kind}", mutant)  # after a failure it lies there
        try:
            manifest = prepare(path, *(["--skip_bad"] if seed % 2 else []))
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            succeeded += 1
            kept = manifest["train_examples"] + manifest["val_examples"]
            assert manifest["total_examples"] == kept + sum(manifest["dropped"].values())
    assert 0 < succeeded < len(seeds)  # the mutants are neither all harmless nor all hopeless
