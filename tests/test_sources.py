"""Where rows come from: kinds of files, encodings, pipes; of a bad file one line says which, where in it, and why."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import random
import re
import sys
import threading
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow.ipc
import pytest

import cli
import prepare_instruct_dataset
from conftest import SRC, run_command, run_script, write_jsonl
from data.rows import open_sources
from data.shards import MANIFEST
from data_files import HARD_ROWS, arrow, lines, listed, parquet, row, table
from errors import UserError
from helpers import expected_of, prepare, texts_of
from instruct_format import prompt_text

ROWS = [row(number) for number in range(12)]
LINES, PRETTY = lines(*HARD_ROWS).decode(), json.dumps(HARD_ROWS, indent=2, ensure_ascii=False)
TEXTS: dict[str, tuple[str, str | bytes]] = {
    "lines": ("a.jsonl", LINES), "ndjson": ("a.ndjson", LINES), "lines in .json": ("A.JSON", LINES),
    "lines in .txt": ("a.txt", LINES), "list": ("a.json", listed(*HARD_ROWS).decode()),
    "list in a line": ("a.jsonl", json.dumps(HARD_ROWS)), "pretty list in .jsonl": ("a.jsonl", "\n\n" + PRETTY),
    "list without suffix": ("a", PRETTY), "list in .csv": ("a.csv", PRETTY), "lines in .tsv": ("a.tsv", LINES),
    "data": ("a.json", json.dumps({"version": "1", "data": HARD_ROWS}, indent=1)),
    "data in one line": ("a.jsonl", json.dumps({"Data": HARD_ROWS})),
    "by columns": ("a.json", json.dumps({name: {str(n): row[name] for n, row in enumerate(HARD_ROWS)}
                                         for name in HARD_ROWS[0]})),
    "by numbers": ("a.json", json.dumps({str(n): row for n, row in enumerate(HARD_ROWS)})),
    "lists by columns": ("a.json", json.dumps({name: [row[name] for row in HARD_ROWS] for name in HARD_ROWS[0]})),
    "by names": ("a.json", json.dumps({f"row{n}": row for n, row in enumerate(HARD_ROWS)})),
    "pandas, split": ("a.json", json.dumps({"columns": [*HARD_ROWS[0]], "index": [*range(len(HARD_ROWS))],
                                            "data": [[*row.values()] for row in HARD_ROWS]})),
    "objects over many lines": ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in HARD_ROWS)),
    "objects in one line": ("a.jsonl", " ".join(map(json.dumps, HARD_ROWS))),
    "lists one after another": ("a.json", json.dumps(HARD_ROWS[:3], indent=1) + json.dumps(HARD_ROWS[3:])),
    "Arrow": ("a.arrow", arrow(pyarrow.ipc.new_stream, *HARD_ROWS)),
    "Feather": ("a.feather", arrow(pyarrow.ipc.new_file, *HARD_ROWS)),
    "under any name": ("a.json", json.dumps({"about": {"by": "me"}, "faq": HARD_ROWS})),
    "lines of joined files": ("a.jsonl", LINES.replace('\n{', '\n\ufeff{')),
    "tables of joined files": ("a.csv", table(HARD_ROWS[:7]) + "\ufeff" + table(HARD_ROWS[7:])),
    "Parquet": ("a.parquet", parquet(*HARD_ROWS)), "Parquet without suffix": ("a", parquet(*HARD_ROWS)),
    "comma": ("a.csv", table(HARD_ROWS)), "semicolon": ("a.csv", table(HARD_ROWS, ";")),
    "sep line": ("a.csv", table(HARD_ROWS, ";", "sep=;\r\n")), "tab": ("a.tsv", table(HARD_ROWS, "\t")),
    "tab in .csv": ("a.CSV", table(HARD_ROWS, "\t")), "bar": ("a.psv", table(HARD_ROWS, "|")),
    "two marks": ("a.csv", "\ufeff" + table(HARD_ROWS)),
    "bar and sep line": ("a.txt", table(HARD_ROWS, "|", "sep=|\r\n")),
    "header with blanks": ("a.csv", table(HARD_ROWS, ";", header=(" Instruction", " INPUT ", "output "))),
    "CRLF, no newline at the end": ("a.jsonl", LINES.rstrip().replace("\n", "\r\n")),
    "CRLF list": ("a.json", PRETTY.replace("\n", "\r\n")), "empty lines": ("a.jsonl", LINES.replace("\n", "\n\n \n")),
    "empty rows above": ("a.csv", ",,\r\n\r\n" + table(HARD_ROWS)),
}
ENCODINGS = {"": "utf-8", "BOM": "utf-8-sig", "UTF-16": "utf-16", "UTF-16BE": "utf-16-be"}


@pytest.mark.parametrize(("name", "encoding"), [(name, encoding) for name, (_, content) in TEXTS.items()
                                                for encoding in ENCODINGS if isinstance(content, str) or not encoding])
def test_every_kind_in_every_encoding_is_read_packed_or_not(tmp_path, name, encoding):
    file, content = TEXTS[name]
    if isinstance(content, str):
        content = (codecs.BOM_UTF16_BE if encoding == "UTF-16BE" else b"") + content.encode(ENCODINGS[encoding])
    for path, data in ((tmp_path / file, content), (tmp_path / f"{file}.gz", gzip.compress(content))):
        path.write_bytes(data)
        [source] = open_sources([str(path)], {})
        assert [{name.strip().lower(): value for name, value in row.items()} for _, row in source.rows] == HARD_ROWS


@pytest.mark.parametrize("text", [
    json.dumps({**ROWS[0], "examples": [{"a": "b"}]}),
    json.dumps({"question": {"text": "Q", "id": "1"}, "answer": {"text": "A", "id": "2"}}),
    json.dumps({"question": {"0": "Q"}, "answer": {"1": "A"}}),
    json.dumps({"messages": [{"role": "user"}], "examples": []}),
    json.dumps({"columns": ["a"], "data": [["b", "c"]]}),
    json.dumps({"dialogue": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
    json.dumps({"prompt": "Q", "chosen": [{"from": "gpt", "value": "A"}], "rejected": [{"from": "gpt", "value": "B"}]}),
    json.dumps({"meta": {}}),
])
def test_an_object_alone_that_is_a_row_stays_one(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    [source] = open_sources([str(tmp_path / "a.json")], {})
    assert [row for _, row in source.rows] == [json.loads(text)]


@pytest.mark.parametrize(("name", "text", "rows"), [
    ("a.csv", 'instruction, output\n"Q 1",  "a, b"\n q, b\n  "Q, 2", c "d"\n   \n', [
        ("Q 1", "a, b"), (" q", " b"), ("Q, 2", ' c "d"')]),
    ("a.csv", 'instruction;output\n"a; b"; "c\n d; ""e"""\n', [("a; b", 'c\n d; "e"')]),
    ("a.csv", "instruction,output,a|b|c|d\n q,a|b,c\n", [(" q", "a|b", "c")]),
    ("a.txt", "sep=|\ninstruction|output\n a|b \n-|--\n", [(" a", "b "), ("-", "--")]),
    ("a.csv", "instruction,output,,\nQ,A,,\n\n", [("Q", "A", "")]),
    ("a.csv", "[instruction],[output]\nQ,A\n", [("Q", "A")]), ("a.csv", "{instruction},output\nQ,A\n", [("Q", "A")]),
    ("a.csv", "instruction,output\nQ,A,,,\nQ,A\n", [("Q", "A")] * 2),
])
def test_blanks_of_tables(tmp_path, name, text, rows):
    """A blank before a quote is none of the field; other blanks are."""
    (tmp_path / name).write_text(text)
    [source] = open_sources([str(tmp_path / name)], {})
    assert [tuple(row.values()) for _, row in source.rows] == rows


@pytest.mark.parametrize("name", ["lines", "list", "semicolon", "Parquet"])
def test_standard_input_and_pipes_are_read_by_their_content(tmp_path, monkeypatch, name):
    content = TEXTS[name][1]
    data = content if isinstance(content, bytes) else content.encode()
    expected = sorted(expected_of(HARD_ROWS))
    for stdin in (data, gzip.compress(data)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin))))
        assert prepare(Path("-"), tmp_path / "out", "--val_fraction", 0.3)["source"] == "standard input"
        assert sorted(sum(texts_of(tmp_path / "out").values(), [])) == expected
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    prepare(tmp_path / "pipe", tmp_path / "out", "--val_fraction", 0.3)
    writer.join()
    assert sorted(sum(texts_of(tmp_path / "out").values(), [])) == expected


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    for number in range(2):
        part = arrow(pyarrow.ipc.new_stream, *ROWS[number * 6:number * 6 + 6])
        (tmp_path / f"data-0000{number}-of-00002.arrow").write_bytes(part)
        (tmp_path / f"cache-{number}.arrow").write_bytes(part)  # of a map
    assert [row for source in open_sources([str(tmp_path)], {}) for _, row in source.rows] == ROWS
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data-00000-of-00002.arrow").rename(tmp_path / "data/train/data-00000-of-00001.arrow")
    with pytest.raises(UserError, match="data: a folder; name one of its splits, such as .*data/train$"):
        open_sources([str(tmp_path / "data")], {})


def test_several_files_and_patterns_are_read_in_order_and_each_once(tmp_path, monkeypatch):
    contents = {"b2.json": listed(*ROWS).decode(), "a.jsonl": lines(*ROWS).decode(), "b1.csv": table(ROWS)}
    for number, (name, text) in enumerate(contents.items()):
        (tmp_path / name).write_text(text.replace("Question ", f"Question {number}"))
    (tmp_path / "[c].jsonl").write_text(contents["a.jsonl"])
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["a.jsonl", "b*", "./b2.json", str(tmp_path / "a.jsonl"), "[c].jsonl", "*.jsonl"]
    assert prepare_instruct_dataset.main(["--dataset", *names, "--output_dir", "out", "--val_fraction", "0.01"]) == 0
    manifest = json.loads(Path("out/dataset_info.json").read_text())
    assert manifest["source"] == "a.jsonl, b1.csv, b2.json, [c].jsonl, d.jsonl"
    assert (manifest["total_examples"], manifest["dropped"]["exact_repeat"]) == (48, 0)
    prompts = [prompt_text(f"Question {number}{n}") for number in ("1", "2", "0", "") for n in range(12)]
    train, val = ([prompt for prompt, _ in side] for side in texts_of(tmp_path / "out").values())
    assert train == [prompt for prompt in prompts if prompt not in val] and len(train) + len(val) == 48


@pytest.mark.parametrize(("names", "told"), [
    (["*.xyz"], r"\*\.xyz: no file matches"), (["absent.csv"], "absent.csv: no such file"),
    (["my data/absent"], "my data/absent: no such file"), (["a/b/c"], "a/b/c: no such file"),
    ([".", "a.jsonl"], r"\.: a folder; name its files, or a pattern such as '\./train\*\.jsonl'$"),
    ([""], "an empty name: no such file"), (["lfs"], "lfs: a pointer of git LFS, .* run git lfs pull"),
    (["https://huggingface.co/datasets/a/b"], "https://huggingface.co/datasets/a/b: no such file; download it"),
    (["empty/train.txt"], "empty/train.txt: no such file"), (["./absent"], "./absent: no such file"),
    (["empty/absent"], "empty/absent: no such file"), (["absent.jsonl.gz"], "absent.jsonl.gz: no such file"),
    (["a.jsonl", "--dataset", "bad.jsonl"], "bad.jsonl: line 1: no column for the output"),
    (["a.jsonl", "--subset", "x"],
     "a.jsonl: --split, --subset, --revision and --streaming are for datasets of the hub"),
    (["-"], r"-: nothing to train on \(0 read, 0 kept"), (["-", "-"], r"-, -: nothing to train on \(0 read, 0 kept"),
    (["a.jsonl", "--output_dir", "a.jsonl"],
     "a.jsonl: no folder, or a link to one that is not there; choose another --output_dir$"),
])
def test_wrong_sources_of_data_are_refused(tmp_path, monkeypatch, names, told):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "I"}] * 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO())))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        prepare_instruct_dataset.main(["--dataset", *names])
    assert re.match(told, str(refused.value)) and "--skip_bad" not in str(refused.value)


def test_flags_reach_the_hub_and_what_it_offers_is_listed(tmp_path, monkeypatch):
    """With messages of the datasets library; the hub itself is not asked."""
    import datasets

    load = Mock(return_value=ROWS)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "me/mine", "--subset", "de", "--split", "train_sft", "--revision", "v1", "--streaming"]
    for given in (flags, flags[:2]):
        assert prepare_instruct_dataset.main([*given, "--output_dir", "out"]) == 0
    assert load.call_args_list == [
        (("me/mine", "de"), {"split": "train_sft", "revision": "v1", "streaming": True}),
        (("me/mine", None), {"split": "train", "revision": None, "streaming": False})]
    assert json.loads(Path("out/dataset_info.json").read_text())["source"] == "me/mine"
    for message, told in (
            ("Config name is missing.\nPlease pick one among the available configs: ['de']\nE", "subset, one of 'de'"),
            ("BuilderConfig 'fr' not found. Available: ['de', 'en']", "choose with --subset, one of 'de', 'en'"),
            ('Unknown split "train". Should be one of [\'a\', \'b\'].', "choose with --split, one of 'a', 'b'"),
            ("Bad split: train. Available splits: ['test']", "choose with --split, one of 'test'"),
            ("Something else", "loading it from the Hugging Face hub failed: Something else; check")):
        load.side_effect = ValueError(message)
        with pytest.raises(UserError, match=f"^me/mine: .*{re.escape(told)}"):
            prepare_instruct_dataset.main([*flags, "--output_dir", "out"])


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.99])
@pytest.mark.parametrize("count", [2, 3])
def test_with_two_prompts_neither_split_is_empty(tmp_path, monkeypatch, count, fraction):
    """Also where a prompt has many answers, where the documents are in written shards, and where all rows say train."""
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 100)
    rows, found = [row(n, f"{n} {answer}") for answer in range(9) for n in range(count)], []
    for named in (rows, [*({**each, "split": "train"} for each in rows), row(99, split="test")]):
        manifest = prepare(write_jsonl(tmp_path / "a.jsonl", named), tmp_path / "out", "--val_fraction", fraction)
        assert manifest["dropped"].get("test_split", 0) == len(named) - len(rows)
        found.append(texts_of(tmp_path / "out"))
        train, val = ({prompt for prompt, _ in side} for side in found[-1].values())
        assert train and val and not train & val and len(train | val) == count
        for side in found[-1].values():  # in the order of the file
            texts = [(prompt_text(each["instruction"]), each["output"]) for each in rows]
            assert side == [text for text in texts if text in side]
    assert found[0] == found[1] and sum(map(len, found[0].values())) == len(rows)


def test_train_and_val_of_one_object_and_a_split_that_only_val_names(tmp_path, capsys):
    wrapped = {"train": ROWS[:6], "Train": ROWS[6:8], "validation_set": ROWS[8:11], "test": ROWS[11:]}
    (tmp_path / "a.json").write_text(json.dumps(wrapped))
    manifest = prepare(tmp_path / "a.json", tmp_path / "out")
    assert [manifest[key] for key in ("train_examples", "val_examples", "dropped")] == [
        8, 3, {"empty_output": 0, "exact_repeat": 0, "bad_row": 0, "test_split": 1}]
    prompts = {prompt for prompt, _ in texts_of(tmp_path / "out")["val"]}
    assert prompts == {prompt_text(row["instruction"]) for row in ROWS[8:11]}
    for split, other in (("val", "train"), ("train", "val")):
        prepare(write_jsonl(tmp_path / "a.jsonl", [{**row, "split": split} for row in ROWS]), tmp_path / "out")
        assert f"no row that is kept names {other}: a hash divides them, not their split\n" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "validation": ROWS[8:]}))
    prepare(tmp_path / "a.json", tmp_path / "out")
    assert "no row that is kept names val: a hash" in capsys.readouterr().out
    prepare(write_jsonl(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "out")
    assert "a hash" not in capsys.readouterr().out
    with pytest.raises(UserError, match="line 2: column 'split' must be in every row or in none; --columns split= "):
        prepare(write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "split": "val"}, ROWS[1]]), tmp_path / "out")


def test_a_pipe_is_prepared_and_the_report_is_printed_in_any_encoding(tmp_path):
    rows = "".join(json.dumps({**row, "output": "\N{ROCKET} \u05d0\u2028x"}) + "\n" for row in ROWS)
    flags = "--dataset", "-", "--output_dir", tmp_path / "out"
    code, stdout, stderr = run_script("prepare_instruct_dataset.py", *flags, stdin=rows,
                                      env={"PYTHONIOENCODING": "latin-1"})
    assert (code, stderr) == (0, "") and ">>>\\U0001f680 \\u05d0\\u2028x<|endoftext|><<<" in stdout
    for number, output in enumerate(("short", "\u6f22" * 3000)):  # the second fills the buffer of standard output
        data = write_jsonl(tmp_path / "a.jsonl", [{**row, "output": output} for row in ROWS])
        found = run_command("bash", "-c", f"{sys.executable} {SRC}/prepare_instruct_dataset.py --dataset {data} "
                            f"--output_dir {tmp_path}/{number} > /dev/full")
        assert (found.code, found.stderr) == (2, "error: standard output: No space left on device\n")
        assert (tmp_path / str(number) / "dataset_info.json").exists()


def csv_of(*rows: str, header: str = "instruction,input,output") -> bytes:
    return "".join(f"{line}\n" for line in (header, *rows)).encode()


JSONL, LISTED, TABLE = lines(*ROWS), listed(*ROWS), csv_of(*(f"Question {n},,Answer {n}" for n in range(12)))
DEEP = b"[" * 100_000 + b"]" * 100_000
BLANKS = "a" + " \n" * 600_000 + "b"
NO_JSON, NO_PARQUET = "cannot be read as JSON: .*", "not a readable Parquet file"
NOTHING = r"nothing to train on \(0 read, 0 kept; dropped: 0 empty output, 0 exact repeat, 0 bad row\)$"
NO_TEXT = r".*; save it as UTF-8, or convert it: iconv -f .* -t UTF-8 OLD > NEW\. An archive other than \.gz has to be "
CUT = "copy or download it again if it is damaged$"

# file name, its bytes, what the one line must say after the name (a regular expression)
BAD: dict[str, tuple[str, bytes, str]] = {
    **{f"no rows in {name} {text!r}": (name, text, NOTHING) for name, text in (
        ("a.json", b" \n\n "), ("a.jsonl", b""), ("a.csv", b""), ("a.json", b"[]"), ("a.csv", csv_of()))},
    "one kept": ("a.jsonl", lines(row(), row(), row(output="")), r"train and val need a prompt each, and there is only "
                 r"one \(3 read, 1 kept; dropped: 1 empty output, 1 exact repeat, 0 bad row\)$"),
    "one question": ("a.jsonl", lines(row(output="a"), row(output="b")), r"train and val need a prompt each, and "
                     r"there is only one: all instructions are the same, with the same input \(2 read, 2 kept; "),
    "only test": ("a.jsonl", lines(*(row(n, split="test") for n in range(9))), r"nothing .*9 read, 0 kept; .* 9 test "
                  r"split\); --columns split= ignores that column$"),
    **{f"{name} of another program {data[:2]}": (name, data, r"line \d: not UTF-8: byte 0x.. in column \d+" + NO_TEXT)
       for name, data in (("a.xlsx", b"PK\3\4..."), ("a.jsonl", b"PK\3\4"), ("a.pdf", b"%PDF-1.4\n%\xe2\xe3"),
                          ("a.bin", b"\1\0\2"), ("a.xls", b"\xd0\xcf\x11\xe0"), ("a.db", b"SQLite format 3\0"),
                          ("a.png", b"\x89PNG\r\n\x1a\n\0\0"), ("a.jsonl", b"Q\xf8\0" * 9))},
    **{f"{name}, packed": (name, data, r"line \d: not UTF-8: byte 0x.. in column \d+" + NO_TEXT) for name, data in (
        ("a.jsonl.bz2", bz2.compress(JSONL)), ("a.jsonl", lzma.compress(JSONL)), ("a.csv.zst", b"\x28\xb5\x2f\xfd"),
        ("a.jsonl.gz", gzip.compress(b"\x28\xb5\x2f\xfd...")), ("no.jsonl.gz", b"Q\xf8\0" * 9))},
    "not JSON, in a list": ("a.json", LISTED.replace(b'"Answer 4"', b"Answer 4"), NO_JSON + "line 6 column 54$"),
    "not JSON, line": ("a.jsonl", JSONL + b"hello\n", r"line 13: cannot be read as JSON: Expecting value: column 1 \("),
    "first line cut": ("a.jsonl", lines(row())[:-2] + b"\n" + JSONL, "line 1: " + NO_JSON),
    "rows under an unknown key": ("a.json", json.dumps({"train": ROWS, "held_out": [row(99)]}).encode(),
                                  "rows under 'train', 'held_out'; put those to train on into one list, or under"),
    "two columns of one name": ("a.csv", csv_of("a,b,c", header="instruction,output,output "),
                                "line 1: two columns 'output'; give each"),
    "two columns of one name, Parquet": ("a.parquet", parquet(row(), names=["instruction", "output", "output"]),
                                         "two columns 'output'; give each"),
    "many objects over many lines, one cut": ("a.json", json.dumps(row(), indent=1).encode() * 2 + b"{",
                                              NO_JSON + "line 9 column 3$"),
    "list not closed": ("a.json", LISTED.rstrip()[:-1], NO_JSON + r"line 13 column \d+$"),
    "UTF-16 list without mark": ("a.json", LISTED.decode().encode("utf-16-le"),
                                 "line 1: not UTF-8: byte 0x00 in column 2" + NO_TEXT),
    "UTF-16 cut": ("a.jsonl", JSONL.decode().encode("utf-16")[:-1], r"after line \d+: not UTF-16" + NO_TEXT),
    "gzip cut": ("a.jsonl.gz", gzip.compress(JSONL)[:-9], r".*end-of-stream.*; " + CUT),
    "gzip damaged": ("a.jsonl.gz", gzip.compress(JSONL)[:-8] + bytes(8), r".*CRC.*; " + CUT),
    "Windows text": ("a.csv", TABLE + "prix,,10 €\n".encode("cp1252"),
                     r"line 14: .*byte 0x80 in column 10; .*iconv -f "),
    "0xff in a line": ("a.jsonl", JSONL.replace(b"r 3", b"\xff"), "line 4: not UTF-8: byte 0xff in column 60"),
    "cut inside a character": ("a.jsonl", JSONL + '{"instruction": "é'.encode()[:-1],
                               rf"line 13: not UTF-8{NO_TEXT}unpacked, .*, a file that is cut copied again"),
    "no column, table": ("a.csv", csv_of("x,y", header="instruction,reply"), r"line 2: no column for the output "
                         r"\(found: 'instruction', 'reply'\); say which it is: --columns instruction=NAME output=NAME"),
    "row is a list": ("a.json", listed(row(), ["x", "", "y"]), r"row 2: expected an object .*found \['x', '', 'y'\]"),
    "nested deeply, list": ("a.json", DEEP, "nested too deeply"),
    "nested deeply, line": ("a.jsonl", lines(row()) + DEEP, "line 2: nested too deeply"),
    "a million blanks": ("a.json", listed(row(), row(output=BLANKS)), r"row 2: column 'output' has 100,000 blanks"),
    "lone surrogate": ("a.jsonl", lines(row(), row(output="a\ud800b")), r"line 2: column 'output' .*surrogate"),
    "too many fields": ("a.csv", TABLE + b"a,b,c,d\n", r"line 14: expected 3 columns .* found 4"),
    "no field for the answer": ("a.csv", TABLE + b"a,b\n", r"line 14: expected 3 columns .* found 2"),
    "Arrow cut": ("a.arrow", arrow(pyarrow.ipc.new_stream, *ROWS)[:300], "not a readable Arrow file"),
    "quote not closed": ("a.csv", TABLE + b'a,,"b\n' + b"c,,d\n" * 9, "line 14: unexpected end .*quote is not clos"),
    "closed by the next": ("a.csv", csv_of('a,,"two', 'lines"', 'b,,"c', 'd,,"e"'), "line 4: .*quote is not closed"),
    "lines that end with CR": ("a.csv", TABLE.replace(b"\n", b"\r"), r"line 1: .*, or a line ends with CR alone$"),
    "text after a quote": ("a.csv", csv_of('a,,"b"c'), r"line 2: .*expected after"),
    "Parquet cut": ("a.parquet", parquet(*ROWS)[:-30], NO_PARQUET),
    "Parquet with a date that Python lacks": ("a.parquet", parquet({**row(), "until": date(9999, 12, 31)}).replace(
        (date(9999, 12, 31) - date(1970, 1, 1)).days.to_bytes(4, "little"), b"\xff\xff\xff\x7f"), NO_PARQUET),
    "Parquet not UTF-8": ("a.parquet", parquet(row()).replace(b"Answer", b"Answe\xff"), NO_PARQUET),
}


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def prepare_beside(data: Path, *flags: object) -> dict[str, Any]:
    return prepare(data, data.parent / "out", "--num_proc", 1, "--val_fraction", 0.5, *flags)


# Where --skip_bad is offered: never for the first row, which the others may be like, an encoding, or a broken file
SINGLE_ROWS = ("not JSON, line", "row is a list", "nested deeply, line", "a million blanks", "lone surrogate",
               "too many fields", "no field for the answer")
BROKEN = ("list not closed", "0xff in a line", "quote not closed", "no column, table", "Parquet not UTF-8")  # no help


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


@pytest.mark.parametrize("name, content, bad", [
    ("a.jsonl", lines(*ROWS, 7, row(output={"a": 1}), {}, row(output="\ud800"), row(99, split="val"), None)
     + b"{\n" + DEEP, 8),
    ("a.jsonl", lines(row())[:-2] + b"\n" + JSONL, 1),
    ("a.json", listed(*ROWS, 7, row(output=[1, 2]), {}), 3),
    ("a.csv", TABLE + b"a\na,b,c,d\n", 2),
    ("a.parquet", parquet(*({**each, "split": None} for each in ROWS), row(output="\0" * 7, split="val")), 1),
], ids=["lines", "first line", "list", "table", "parquet"])
def test_skip_bad_drops_and_counts(tmp_path, name, content, bad):
    data = write(tmp_path, name, content)
    manifest = prepare_beside(data, "--skip_bad")
    assert manifest["dropped"] == {"empty_output": 0, "exact_repeat": 0, "bad_row": bad}
    assert manifest["train_examples"] + manifest["val_examples"] == 12 == manifest["total_examples"] - bad
    with pytest.raises(UserError, match=f"{name}.*(--skip_bad drops such rows|--columns split= ignores that column|"
                       "line 1: cannot be read as JSON)"):
        prepare_beside(data)


PIECES = (b"", b'"', b"{", b"[", b"]", b",", b"\n", b"\r", b"\0", b"\\ud800", b"\xed\xa0\x80", b"null", b"-1e999",
          b"NaN", b"\xf0\x9f", codecs.BOM_UTF8, codecs.BOM_UTF16_LE)
ORIGINALS = {
    "json": json.dumps(HARD_ROWS, indent=1, ensure_ascii=False).encode(), "jsonl": lines(*HARD_ROWS),
    "csv": table(HARD_ROWS).encode(), "parquet": parquet(*HARD_ROWS),
    "arrow": arrow(pyarrow.ipc.new_stream, *HARD_ROWS), "feather": arrow(pyarrow.ipc.new_file, *HARD_ROWS),
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
            manifest = prepare_beside(path, *(["--skip_bad"] if seed % 2 else []))
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            succeeded += 1
            kept = manifest["train_examples"] + manifest["val_examples"]
            assert manifest["total_examples"] == kept + sum(manifest["dropped"].values())
    assert 0 < succeeded < len(seeds)  # the mutants are neither all harmless nor all hopeless
