"""Where rows come from: kinds of files, encodings, separators, several files, pipes, and very small data."""

import codecs
import gzip
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

import prepare_instruct_dataset
from conftest import SRC, run_command, run_script, write_jsonl
from data.rows import open_sources
from data_files import HARD_ROWS, lines, listed, parquet, row, table
from errors import UserError
from helpers import prepare, texts_of
from instruct_format import prompt_text, tidy

ROWS = [row(number) for number in range(12)]
LINES, PRETTY = lines(*HARD_ROWS).decode(), json.dumps(HARD_ROWS, indent=2, ensure_ascii=False)
TEXTS: dict[str, tuple[str, str | bytes]] = {
    "lines": ("a.jsonl", LINES), "ndjson": ("a.ndjson", LINES), "lines in .json": ("A.JSON", LINES),
    "lines in .txt": ("a.txt", LINES), "list": ("a.json", listed(*HARD_ROWS).decode()),
    "list in a line": ("a.jsonl", json.dumps(HARD_ROWS)), "pretty list in .jsonl": ("a.jsonl", "\n\n" + PRETTY),
    "list without suffix": ("a", PRETTY), "data": ("a.json", json.dumps({"version": "1", "data": HARD_ROWS}, indent=1)),
    "data in one line": ("a.jsonl", json.dumps({"Data": HARD_ROWS})),
    "by columns": ("a.json", json.dumps({name: {str(n): row[name] for n, row in enumerate(HARD_ROWS)}
                                         for name in HARD_ROWS[0]})),
    "by numbers": ("a.json", json.dumps({str(n): row for n, row in enumerate(HARD_ROWS)})),
    "lists by columns": ("a.json", json.dumps({name: [row[name] for row in HARD_ROWS] for name in HARD_ROWS[0]})),
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
}
ENCODINGS = {"": "utf-8", "BOM": "utf-8-sig", "UTF-16": "utf-16", "UTF-16BE": "utf-16-be"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("expected")
    prepare(write_jsonl(folder / "a.jsonl", HARD_ROWS), folder / "out", "--val_fraction", 0.3)
    texts = texts_of(folder / "out")
    assert sorted(sum(texts.values(), [])) == sorted(
        (prompt_text(row["instruction"], row["input"]), tidy(row["output"])) for row in HARD_ROWS)
    return texts


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
])
def test_blanks_of_tables(tmp_path, name, text, rows):
    """A blank before a quote is none of the field; other blanks are."""
    (tmp_path / name).write_text(text)
    [source] = open_sources([str(tmp_path / name)], {})
    assert [tuple(row.values()) for _, row in source.rows] == rows


def typed(data: bytes) -> io.TextIOWrapper:
    """What sys.stdin is."""
    return io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lines", "list", "semicolon", "Parquet"])
def test_standard_input_and_pipes_are_read_by_their_content(tmp_path, expected, monkeypatch, name):
    content = TEXTS[name][1]
    data = content if isinstance(content, bytes) else content.encode()
    for stdin in (data, gzip.compress(data)):
        monkeypatch.setattr("sys.stdin", typed(stdin))
        assert prepare(Path("-"), tmp_path / "out", "--val_fraction", 0.3)["source"] == "standard input"
        assert texts_of(tmp_path / "out") == expected
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    prepare(tmp_path / "pipe", tmp_path / "out", "--val_fraction", 0.3)
    writer.join()
    assert texts_of(tmp_path / "out") == expected


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
    (["a.jsonl", "--streaming"], "a.jsonl: --split, --subset"),
    (["-"], r"-: nothing to train on \(0 read, 0 kept"), (["-", "-"], r"-, -: nothing to train on \(0 read, 0 kept"),
    (["a.jsonl", "--output_dir", "a.jsonl"], "a.jsonl: cannot write there: File exists; choose another --output_dir$"),
    (["a.jsonl", "bad.jsonl"], "bad.jsonl: line 1: no column for the output"),
])
def test_wrong_sources_of_data_are_refused(tmp_path, monkeypatch, names, told):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "I"}] * 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr("sys.stdin", typed(b""))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        prepare_instruct_dataset.main(["--dataset", *names])
    assert re.match(told, str(refused.value)) and "--skip_bad" not in str(refused.value)


def test_flags_reach_the_hub_and_what_it_offers_is_listed(tmp_path, monkeypatch):
    """With messages of the datasets library; the hub itself is not asked."""
    import datasets

    asked: list[tuple[tuple, dict]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **flags: asked.append((names, flags)) or ROWS)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "me/mine", "--subset", "de", "--split", "train_sft", "--revision", "v1", "--streaming"]
    for given in (flags, flags[:2]):
        assert prepare_instruct_dataset.main([*given, "--output_dir", "out"]) == 0
    assert asked == [(("me/mine", "de"), {"split": "train_sft", "revision": "v1", "streaming": True}),
                     (("me/mine", None), {"split": "train", "revision": None, "streaming": False})]
    assert json.loads(Path("out/dataset_info.json").read_text())["source"] == "me/mine"
    for message, told in (
            ("Config name is missing.\nPlease pick one among the available configs: ['de']\nE", "subset, one of 'de'"),
            ("BuilderConfig 'fr' not found. Available: ['de', 'en']", "choose with --subset, one of 'de', 'en'"),
            ('Unknown split "train". Should be one of [\'a\', \'b\'].', "choose with --split, one of 'a', 'b'"),
            ("Bad split: train. Available splits: ['test']", "choose with --split, one of 'test'"),
            ("Something else", "loading it from the Hugging Face hub failed: Something else; check")):
        def refuse(*_: object, message: str = message, **__: object) -> None:
            raise ValueError(message)

        monkeypatch.setattr(datasets, "load_dataset", refuse)
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
