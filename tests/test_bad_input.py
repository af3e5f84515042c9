"""Whatever file it is given, preparation succeeds or says in one line which file, where in it, and why."""

from __future__ import annotations

import codecs
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli
import prepare_instruct_dataset
from cli import UserError
from conftest import run_script
from manifest import read_manifest

Row = Any


def row(number: int = 0, **changes: Row) -> dict[str, Row]:
    return {"instruction": f"Question {number}", "input": "", "output": f"Answer {number}", **changes}


GOOD = [row(number) for number in range(12)]


def lines(*rows: Row) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def listed(*rows: Row) -> bytes:
    """A JSON list with one row a line: row N stands in line N + 1."""
    return ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode()


def table(*rows: str, header: str = "instruction,input,output") -> bytes:
    return "".join(f"{line}\n" for line in (header, *rows)).encode()


def parquet(*rows: Row) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def not_utf8_parquet() -> bytes:
    """A text column whose bytes are not text; pyarrow does not look when it writes."""
    import pyarrow

    columns = {name: pyarrow.array([b"\xff\xfe"]).view(pyarrow.string()) for name in GOOD[0]}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


CSV_GOOD = ("Question 1,,Answer 1", "Question 2,,Answer 2")
DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LONG_NUMBER = b'{"instruction": ' + b"9" * 5000 + b', "input": "", "output": "x"}'

# file name, its bytes, what the one line must say after the name (a regular expression)
BAD: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty list file": ("a.json", b"", r"line 1: .*the file is empty"),
    "empty lines file": ("a.jsonl", b"", r"no example .*\(0 kept of 0 read\)"),
    "empty table": ("a.csv", b"", r"no column 'instruction', 'input', 'output'"),
    "empty parquet": ("a.parquet", b"", r"not a readable Parquet file"),
    "white space only": ("a.json", b" \n\n ", r"line 1: .*the file is empty"),
    "empty list": ("a.json", b"[]", r"no example .*\(0 kept of 0 read\)"),
    "header only": ("a.csv", table(), r"no example .*\(0 kept of 0 read\)"),
    "unknown kind": ("a.txt", lines(*GOOD), r"unknown kind of file; use \.json, \.jsonl, \.csv, \.parquet"),
    "no suffix": ("data", lines(*GOOD), r"unknown kind of file"),
    "not JSON, list": ("a.json", b"hello", r"line 1: expected a list of objects"),
    "not JSON, in a list": ("a.json", listed(*GOOD).replace(b'"Answer 4"', b"Answer 4"), r"line 6, row 5: not JSON"),
    "not JSON, line": ("a.jsonl", lines(*GOOD[:2]) + b"hello\n", r"line 3: not JSON"),
    "a scalar": ("a.json", b"42", r"line 1: expected a list of objects"),
    "one object over many lines": ("a.json", json.dumps(row(), indent=1).encode(), r"line 1: not JSON"),
    "list not closed": ("a.json", listed(*GOOD).rstrip()[:-1], r"line 14, row 12: the list is not closed"),
    "list cut in a row": ("a.json", listed(*GOOD)[:-20], r"line 13, row 12: not JSON"),
    "list without a comma": ("a.json", listed(*GOOD).replace(b'1"},\n', b'1"}\n', 1), r"line 4, row 2: expected ,"),
    "list with one comma more": ("a.json", listed(*GOOD).replace(b"\n]", b",\n]"), r"line 14, row 13: not JSON"),
    "text after the list": ("a.json", listed(*GOOD) + b"[]", r"line 15, row 12: there is text after the list"),
    "line cut": ("a.jsonl", lines(*GOOD)[:-9], r"line 12: not JSON"),
    "UTF-16 list": ("a.json", listed(*GOOD).decode().encode("utf-16"), r"line 1: not UTF-8"),
    "UTF-16 lines": ("a.jsonl", lines(*GOOD).decode().encode("utf-16"), r"line 1: not UTF-8"),
    "UTF-16 table": ("a.csv", table(*CSV_GOOD).decode().encode("utf-16"), r"line 1: not UTF-8"),
    "UTF-16 list without mark": ("a.json", listed(*GOOD).decode().encode("utf-16-le"), r"line 1"),
    "byte 0xff in a list": ("a.json", listed(*GOOD).replace(b"Answer 3", b"Answ\xff"), r"line 5: not UTF-8: byte 0xff"),
    "byte 0xff in a line": ("a.jsonl", lines(*GOOD).replace(b"Answer 3", b"Answ\xff"), r"line 4: not UTF-8: byte 0xff"),
    "byte 0xff in a table": ("a.csv", table(*CSV_GOOD).replace(b"r 2", b"\xff"), r"line 3: not UTF-8: byte 0xff"),
    "byte 0xff in a header": ("a.csv", table(*CSV_GOOD).replace(b"output", b"\xff"), r"line 1: not UTF-8: byte 0xff"),
    "byte 0xff in a quoted field": ("a.csv", table('"a\nb",,c', *CSV_GOOD).replace(b"b\"", b"\xff\""),
                                    r"line 3: not UTF-8: byte 0xff"),
    "cut inside a character": ("a.jsonl", lines(*GOOD) + '{"instruction": "é'.encode()[:-1], r"line 13: not UTF-8"),
    "list cut inside a character": ("a.json", '[{"instruction": "é'.encode()[:-1], r"line 1: not UTF-8"),
    "Latin-1": ("a.jsonl", lines(row()).replace(b"Answer", b"caf\xe9"), r"line 1: not UTF-8: byte 0xe9"),
    "no column, list": ("a.json", listed(row(), {"instruction": "x", "output": "y"}), r"row 2: no column 'input'"),
    "no column, lines": ("a.jsonl", lines(row(), {"prompt": "x"}), r"line 2: no column 'instruction' .*'prompt'"),
    "no column, table": ("a.csv", table("x,y", header="instruction,output"), r"no column 'input' .*'instruction'"),
    "no column, parquet": ("a.parquet", lambda: parquet({"text": "x"}), r"no column 'instruction'.*found: 'text'"),
    "a number": ("a.jsonl", lines(row(), row(output=7)), r"line 2: column 'output' must be text, found a number"),
    "a list": ("a.jsonl", lines(row(instruction=["x"])), r"line 1: column 'instruction' must be text, found a list"),
    "an object": ("a.jsonl", lines(row(input={})), r"line 1: column 'input' must be text, found an object"),
    "a boolean": ("a.json", listed(row(), row(output=True)), r"row 2: column 'output' must be text, found a boolean"),
    "null output": ("a.jsonl", lines(row(output=None)), r"line 1: column 'output' must be text, found null"),
    "null instruction": ("a.json", listed(row(instruction=None)), r"row 1: column 'instruction' must be .* found null"),
    "parquet null": ("a.parquet", lambda: parquet(row(), row(output=None)), r"row 2: column 'output' .*found null"),
    "parquet number": ("a.parquet", lambda: parquet(row(output=7)), r"row 1: column 'output' .*found a number"),
    "row is a list": ("a.json", listed(row(), ["x", "", "y"]), r"row 2: expected an object .*found a list"),
    "row is text": ("a.jsonl", lines("x"), r"line 1: expected an object .*found text"),
    "row is null": ("a.json", listed(None), r"row 1: expected an object .*found null"),
    "row is a number": ("a.jsonl", lines(1.5), r"line 1: expected an object .*found a number"),
    "nested deeply, list": ("a.json", DEEP, r"line 1, row 1: nested too deeply"),
    "nested deeply, line": ("a.jsonl", lines(row()) + DEEP, r"line 2: nested too deeply"),
    "objects nested deeply": ("a.json", b"[" + DEEP_OBJECT + b"]", r"line 1, row 1: nested too deeply"),
    "whole number of 5,000 digits": ("a.jsonl", LONG_NUMBER, r"line 1: (not JSON|column 'instruction' must be text)"),
    "the same in a list": ("a.json", b"[" + LONG_NUMBER + b"]", r"row 1: (not JSON|column 'instruction' must be text)"),
    "NUL in a line": ("a.jsonl", lines(*GOOD).replace(b"Answer 1", b"Answ\0er", 1), r"line 2: not JSON"),
    "NUL in a list": ("a.json", listed(*GOOD).replace(b"Answer 1", b"Answ\0er", 1), r"line 3, row 2: not JSON"),
    "nothing but NUL": ("a.json", b"\0" * 1000, r"line 1: expected a list of objects"),
    "lines of NUL": ("a.jsonl", b"\0" * 1000, r"line 1: not JSON"),
    "lone surrogate": ("a.jsonl", lines(row(), row(output="a\ud800b")), r"line 2: column 'output' .*surrogate"),
    "lone surrogate in a list": ("a.json", listed(row(input="\udfff")), r"row 1: column 'input' .*surrogate"),
    "unknown split": ("a.jsonl", lines(row(split="test")), r"line 1: column 'split' must be .* found 'test'"),
    "split of another type": ("a.jsonl", lines(row(split=["val"])), r"line 1: column 'split' must be train or val"),
    "too many fields": ("a.csv", table(*CSV_GOOD, "a,b,c,d"), r"line 4: expected 3 columns"),
    "too few fields": ("a.csv", table("a,b", *CSV_GOOD), r"line 2: expected 3 columns"),
    "quote not closed": ("a.csv", table(*CSV_GOOD, 'a,,"b'), r"line 4: unexpected end of data"),
    "text after a quote": ("a.csv", table('a,,"b"c'), r"line 2: .*expected after"),
    "no Parquet": ("a.parquet", b"hello " * 100, r"not a readable Parquet file"),
    "Parquet cut": ("a.parquet", lambda: parquet(*GOOD)[:-30], r"not a readable Parquet file"),
    "Parquet without its middle": ("a.parquet", lambda: b"PAR1" + parquet(*GOOD)[300:], r"not a readable Parquet file"),
    "Parquet that is not UTF-8": ("a.parquet", not_utf8_parquet, r"not a readable Parquet file"),
    "a folder": ("folder.jsonl", b"", r"not a file"),
    "nothing there": ("missing.jsonl", b"", r"no such file"),
    "name that a terminal would obey": ("\x1b[2J\n\u202e.jsonl", lines(7), r"line 1: expected an object"),
}


def write(folder: Path, name: str, content: bytes | Callable[[], bytes]) -> Path:
    path = folder / name
    if name.startswith("folder"):
        path.mkdir()
    elif not name.startswith("missing"):
        path.write_bytes(content if isinstance(content, bytes) else content())
    return path


def prepare(data: Path, *flags: str) -> int:
    return prepare_instruct_dataset.main(["--dataset", str(data), "--output_dir", str(data.parent / "out"),
                                          "--num_proc", "1", *flags])


def check_refusal(code: int, stderr: str, data: Path, expected: str) -> None:
    assert code == 2
    assert stderr.count("\n") == 1 and stderr.endswith("\n")
    name = cli.printable_line(data)
    assert stderr.startswith(f"error: {name}: ")
    assert re.search(expected, stderr.removeprefix(f"error: {name}: "))
    assert stderr[:-1].isprintable()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    name, content, expected = BAD[case]
    data = write(tmp_path, name, content)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: prepare(data))
    check_refusal(left.value.code, capfd.readouterr().err, data, expected)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize("case", ["nothing there", "UTF-16 lines", "objects nested deeply", "Parquet cut",
                                  "name that a terminal would obey"])
def test_the_script_itself_refuses_alike(tmp_path: Path, case: str) -> None:
    name, content, expected = BAD[case]
    data = write(tmp_path, name, content)
    code, stdout, stderr = run_script("prepare_instruct_dataset.py", "--dataset", data, "--output_dir", tmp_path / "o")
    check_refusal(code, stderr, data, expected)
    assert stdout == ""


def test_an_unknown_hub_dataset_is_one_line(tmp_path: Path) -> None:
    code, _, stderr = run_script("prepare_instruct_dataset.py", "--dataset", "nobody/nothing", "--output_dir",
                                 tmp_path / "out", env={"HF_HOME": str(tmp_path / "hf")})
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: nobody/nothing: not a local file, and loading it from the Hugging Face hub failed")


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("the user's")
    data = write(tmp_path, "a.jsonl", lines(*GOOD))
    told = f"{re.escape(str(tmp_path / output))}: cannot write there: (File exists|Not a directory)"
    with pytest.raises(UserError, match=told):
        prepare_instruct_dataset.main(["--dataset", str(data), "--output_dir", str(tmp_path / output)])
    assert (tmp_path / "file").read_text() == "the user's"


FINE: dict[str, tuple[str, bytes]] = {
    "CRLF lines": ("a.jsonl", lines(*GOOD).replace(b"\n", b"\r\n")),
    "CRLF list": ("a.json", listed(*GOOD).replace(b"\n", b"\r\n")),
    "CRLF table": ("a.csv", table(*(f"Question {n},,Answer {n}" for n in range(12))).replace(b"\n", b"\r\n")),
    "BOM lines": ("a.jsonl", codecs.BOM_UTF8 + lines(*GOOD)),
    "BOM list": ("a.json", codecs.BOM_UTF8 + listed(*GOOD)),
    "BOM table": ("a.csv", codecs.BOM_UTF8 + table(*(f"Question {n},,Answer {n}" for n in range(12)))),
    "BOM JSON lines in .json": ("a.json", codecs.BOM_UTF8 + b"\n" + lines(*GOOD)),
    "empty lines between": ("a.jsonl", lines(*GOOD).replace(b"\n", b"\n\n \n")),
    "no newline at the end": ("a.jsonl", lines(*GOOD).rstrip()),
    "null input": ("a.jsonl", lines(*({**each, "input": None} for each in GOOD))),
    "more columns": ("a.jsonl", lines(*({**each, "id": 7, "split": None} for each in GOOD))),
    "surrogate pair in escapes": ("a.jsonl", lines(*GOOD[:-1], row(11, output="\N{ROCKET}"))),
}


@pytest.mark.parametrize("case", FINE)
def test_harmless_variants_are_read(tmp_path: Path, case: str) -> None:
    assert prepare(write(tmp_path, *FINE[case]), "--val_fraction", "0.5") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["total_examples"] == 12 == manifest["train_examples"] + manifest["val_examples"]


@pytest.mark.parametrize("text", ["word " * 600_000, "a" * 1_000_000, "a" + " " * 1_100_000 + "b",
                                  "a" + "\n" * 1_100_000 + "b"], ids=["words", "letters", "spaces", "newlines"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_huge_line_is_read_or_refused(tmp_path: Path, name: str, text: str) -> None:
    content = (lines if name.endswith("l") else listed)(*GOOD, row(12, output=text))
    try:
        prepare(write(tmp_path, name, content), "--val_fraction", "0.5")
    except UserError as error:
        assert re.search(r"(line|row) 13", str(error))
    else:
        assert read_manifest(tmp_path / "out")["total_examples"] == 13


SKIPPABLE = {
    "a.jsonl": (lines(*GOOD, 7, row(output=7), {}, row(output="\ud800"), row(split="x"), None) + b"{\n" + DEEP
                + b"\n\xff\n", 9),
    "a.json": (listed(*GOOD, 7, row(output=7), {}, row(output="\ud800"), None), 5),
    "a.csv": (table(*(f"Question {n},,Answer {n}" for n in range(12)), "a", "a,b,c,d") + b"a,\xff,b\n", 3),
    "a.parquet": (lambda: parquet(*({**each, "split": None} for each in GOOD), row(output=None), row(split="x")), 2),
}


@pytest.mark.parametrize("name", SKIPPABLE)
def test_skip_bad_drops_and_counts(tmp_path: Path, name: str) -> None:
    content, bad = SKIPPABLE[name]
    data = write(tmp_path, name, content)
    assert prepare(data, "--skip_bad", "--val_fraction", "0.5") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["dropped"] == {"empty_output": 0, "exact_repeat": 0, "bad_row": bad}
    assert manifest["train_examples"] + manifest["val_examples"] == 12 == manifest["total_examples"] - bad
    with pytest.raises(UserError, match=f"{name}.*--skip_bad drops such rows"):
        prepare(data)


def test_skip_bad_does_not_skip_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the list is not closed"):
        prepare(write(tmp_path, "a.json", listed(*GOOD).rstrip()[:-1]), "--skip_bad")


FUZZED = [*GOOD, row(12, output="two\nlines, \"quoted\""), row(13, input="\N{ROCKET}\u6f22", split="val")]
SEEDS: dict[str, Callable[[], bytes]] = {
    "f.json": lambda: json.dumps(FUZZED, indent=1, ensure_ascii=False).encode(),
    "f.jsonl": lambda: lines(*FUZZED),
    "f.csv": lambda: table(*(f'Question {n},"in, {n}","Answer\n""{n}"""' for n in range(14))),
    "f.parquet": lambda: parquet(*FUZZED),
}


KINDS = ("flip", "flip", "byte", "truncate", "insert", "delete", "repeat", "bom", "utf16", "latin")
PIECES = (b'"', b"{", b"[", b"]", b",", b"\n", b"\r", b"\0", b"\\ud800", b"\xed\xa0\x80", b"null", b"-1e999", b"NaN",
          b"\xf0\x9f")
BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to three random changes of the kinds that disks, editors and transfers make."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        kind = chance.choice(KINDS)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:]
        elif kind == "byte":
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1:]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "insert":
            piece = chance.choice([*PIECES, chance.randbytes(8)])
            data = data[:at] + piece * chance.choice([1, 1, 50]) + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + chance.randint(1, 40):]
        elif kind == "repeat":
            data = data[:at] + data[max(0, at - chance.randint(1, 200)):]
        elif kind == "bom":
            data = chance.choice(BOMS) + data
        elif kind == "utf16":
            data = data.decode("latin-1").encode(chance.choice(["utf-16", "utf-16-le", "utf-16-be"]))
        else:
            data = data.decode("utf-8", "replace").encode("latin-1", "replace")
    return data


def fuzz(folder: Path, name: str, first: int, count: int) -> None:
    """Prepare count mutants: each succeeds with numbers that add up, or is a UserError of one line."""
    original = SEEDS[name]()
    succeeded = 0
    for seed in range(first, first + count):
        mutant = mutate(original, random.Random(f"{name} {seed}"))
        path = folder / name
        path.write_bytes(mutant)
        try:
            prepare(path, "--val_fraction", "0.5", *(["--skip_bad"] if seed % 2 else []))
        except UserError as error:
            assert str(error).startswith(f"{path}: "), f"mutant {seed}: {error}"
        except BaseException as error:
            pytest.fail(f"mutant {seed}, {mutant!r}: {error!r}")
        else:
            succeeded += 1
            manifest = read_manifest(folder / "out")
            kept = manifest["train_examples"] + manifest["val_examples"]
            assert manifest["total_examples"] == kept + sum(manifest["dropped"].values()), f"mutant {seed}"
    assert 0 < succeeded < count  # the mutants are neither all harmless nor all hopeless


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about a power cut, and fsync takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("name", SEEDS)
def test_mutants_are_prepared_or_refused(tmp_path: Path, name: str, no_fsync: None) -> None:
    fuzz(tmp_path, name, 0, 63)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_a_thousand_mutants_are_prepared_or_refused(tmp_path: Path, name: str, no_fsync: None) -> None:
    fuzz(tmp_path, name, 1000, 250)
