"""Preparation from a file to shards: what is kept, where it goes, what is written, and what is told."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_instruct_dataset
from cli import UserError
from conftest import run_script, write_jsonl
from data_report import histogram, percentile
from instruct_format import END_OF_TEXT, TEMPLATE, TOKENIZER, prompt_text, tokenizer
from manifest import read_manifest

Row = dict[str, Any]
Files = dict[str, bytes]

HARD_TEXTS = ("two\nlines", 'quo"tes, commas', "emoji \N{ROCKET} and \u6f22\u5b57", "<|endoftext|>", "windows\r\nline",
              "tab\tand 'single'", "back\\slash", "1", "null", "\u2028 separator")
ROWS: list[Row] = [{"instruction": f"Question {number}: {text}", "input": text * (number % 2), "output": f"{text}!"}
                   for number, text in enumerate(HARD_TEXTS * 3)]


def row(instruction: str = "Do.", output: str = "Done.", **more: Any) -> Row:
    return {"instruction": instruction, "input": "", "output": output, **more}


def questions(count: int, answers: int = 1) -> list[Row]:
    return [row(f"Question {number}", f"Answer {answer}") for answer in range(answers) for number in range(count)]


def prepare(dataset: Path, output: Path, *flags: str) -> dict[str, Any]:
    assert prepare_instruct_dataset.main(["--dataset", str(dataset), "--output_dir", str(output), *flags]) == 0
    return json.loads((output / "dataset_info.json").read_bytes())


def prepare_rows(folder: Path, rows: list[Row], *flags: str) -> dict[str, Any]:
    return prepare(write_jsonl(folder / "data.jsonl", rows), folder / "out", *flags)


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def examples_of(output: Path, split: str) -> list[tuple[str, str]]:
    """(prompt, response) of every example, decoded from the arrays that the manifest names."""
    result = []
    for shard in json.loads((output / "dataset_info.json").read_bytes())["shards"][split]:
        tokens, mask, starts = (np.load(output / split / f"{shard['name']}.{kind}.npy")
                                for kind in ("tokens", "loss_mask", "starts"))
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            prompt_tokens = int((mask[start:end] == 0).sum())
            assert mask[start:end].tolist() == [0] * prompt_tokens + [1] * (end - start - prompt_tokens)
            assert tokens[end - 1] == END_OF_TEXT
            parts = tokens[start:start + prompt_tokens], tokens[start + prompt_tokens:end - 1]
            prompt, response = (tokenizer().decode_bytes(part.tolist()).decode() for part in parts)
            result.append((prompt, response))
    return result


def expected_of(rows: list[Row]) -> Counter[tuple[str, str]]:
    return Counter((prompt_text(row["instruction"], row["input"]), row["output"].strip()) for row in rows)


def write_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


def write_utf8_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path) -> None:
    write_jsonl(path, ROWS)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["output", "instruction", "unused", "input"])
        writer.writeheader()
        writer.writerows({**row, "unused": "x"} for row in ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "unused": [1, 2]} for row in ROWS]), path)


WRITERS = {"list.json": write_list, "utf8.json": write_utf8_list, "lines.json": write_lines, "lines.jsonl": write_lines,
           "table.csv": write_csv, "table.parquet": write_parquet, "UPPER.JSONL": write_lines}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    prepare_rows(folder, ROWS, "--val_fraction", "0.3")
    return folder / "out"


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_data(tmp_path: Path, reference: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    manifest = prepare(tmp_path / name, tmp_path / "out", "--val_fraction", "0.3")
    assert manifest["source"] == name
    got, expected = files_of(tmp_path / "out"), files_of(reference)
    manifests = [json.loads(files.pop("dataset_info.json")) for files in (got, expected)]
    assert [{**manifest, "source": "", "sha256": ""} for manifest in manifests[:1]] == [
        {**manifest, "source": "", "sha256": ""} for manifest in manifests[1:]]
    assert got == expected


def test_the_script_does_what_main_does(tmp_path: Path, reference: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    code, stdout, stderr = run_script("prepare_instruct_dataset.py", "--dataset", data, "--val_fraction", "0.3",
                                      "--output_dir", "out", cwd=tmp_path)
    assert (code, stderr) == (0, "")
    assert f"examples   {len(ROWS)} read, {len(ROWS)} kept; dropped: 0 empty output, 0 exact repeat" in stdout
    assert stdout.endswith("wrote out/dataset_info.json; next: ./start_instruct_training.sh\n")
    assert files_of(tmp_path / "out") == files_of(reference)


def test_the_texts_come_back_from_the_shards(reference: Path) -> None:
    examples = [example for split in ("train", "val") for example in examples_of(reference, split)]
    assert Counter(examples) == expected_of(ROWS)


def test_examples_keep_the_order_of_the_file(tmp_path: Path) -> None:
    prepare_rows(tmp_path, questions(40), "--val_fraction", "0.5")
    for split in ("train", "val"):
        prompts = [prompt for prompt, _ in examples_of(tmp_path / "out", split)]
        assert prompts == sorted(prompts, key=lambda prompt: int(re.findall(r"\d+", prompt)[0]))


def test_manifest_has_what_the_contract_names(tmp_path: Path) -> None:
    manifest = prepare_rows(tmp_path, questions(40), "--val_fraction", "0.25", "--seed", "7")
    assert read_manifest(tmp_path / "out") == manifest
    assert (manifest["format_version"], manifest["template"], manifest["tokenizer"]) == (1, TEMPLATE, TOKENIZER)
    assert (manifest["source"], manifest["seed"], manifest["val_fraction"]) == ("data.jsonl", 7, 0.25)
    assert manifest["total_examples"] == 40 == manifest["train_examples"] + manifest["val_examples"]
    assert manifest["dropped"] == {"empty_output": 0, "exact_repeat": 0, "bad_row": 0}
    for split in ("train", "val"):
        arrays = {kind: [] for kind in ("tokens", "loss_mask", "starts")}
        for shard in manifest["shards"][split]:
            for kind in arrays:
                path = tmp_path / "out" / split / f"{shard['name']}.{kind}.npy"
                assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"][kind]
                arrays[kind].append(np.load(path, mmap_mode="r"))
        tokens, mask, starts = (np.concatenate(arrays[kind]) for kind in arrays)
        assert (tokens.dtype, mask.dtype.itemsize, starts.dtype) == (np.uint16, 1, np.int64)
        assert (len(starts), len(tokens), mask.sum()) == (
            manifest[f"{split}_examples"], manifest[f"{split}_tokens"], manifest[f"{split}_response_tokens"])


def test_what_is_dropped_is_counted_and_nothing_else_is_dropped(tmp_path: Path) -> None:
    kept = [*questions(30), row("Question 0", "another answer"), row("question 0", "Answer 0"), row("", "no question"),
            row("Question 1", "Answer 0", input="x"), row("Short", ".")]
    dropped = [row("Empty", ""), row("Empty", " \n"), row("Question 2", "Answer 0"), row(" Question 3\n", "Answer 0 "),
               row("Question 4", "Answer 0", input=None)]
    manifest = prepare_rows(tmp_path, kept + dropped, "--val_fraction", "0.3")
    assert manifest["dropped"] == {"empty_output": 2, "exact_repeat": 3, "bad_row": 0}
    assert manifest["total_examples"] == len(kept) + 5
    examples = [example for split in ("train", "val") for example in examples_of(tmp_path / "out", split)]
    assert Counter(examples) == expected_of(kept)


def test_no_room_for_the_file_that_finds_repeats_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count = 4")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    rows = [{"instruction": str(number), "input": "", "output": "x"} for number in range(2000)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match="repeated rows: database or disk is full"):
        prepare_instruct_dataset.main(["--dataset", str(data), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "dataset_info.json").exists()


def test_fields_that_join_to_the_same_text_are_no_repeats(tmp_path: Path) -> None:
    rows = [row("ab", "c"), row("a", "bc"), row("a", "c", input="b"), *questions(20)]
    assert prepare_rows(tmp_path, rows, "--val_fraction", "0.3")["dropped"]["exact_repeat"] == 0


def test_output_is_byte_identical_for_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_instruct_dataset, "BATCH_EXAMPLES", 7)
    monkeypatch.setattr(prepare_instruct_dataset, "SHARD_TOKENS", 400)
    data = write_jsonl(tmp_path / "data.jsonl", [*questions(150, 2), *ROWS])
    for workers in (1, 3):
        prepare(data, tmp_path / str(workers), "--num_proc", str(workers))
    assert len(files_of(tmp_path / "1")) > 20
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def sides(output: Path) -> tuple[set[str], set[str]]:
    train, val = ({prompt for prompt, _ in examples_of(output, split)} for split in ("train", "val"))
    return train, val


def test_equal_prompts_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = questions(100, 3) + [row(f" Question {number}\n", "yet another") for number in range(100)]
    prepare_rows(tmp_path, rows, "--val_fraction", "0.3")
    train, val = sides(tmp_path / "out")
    assert not train & val
    assert len(train | val) == 100


def test_split_is_a_function_of_the_seed(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", questions(200))
    for name, seed in (("a", "42"), ("b", "42"), ("c", "43")):
        prepare(data, tmp_path / name, "--seed", seed, "--val_fraction", "0.2")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sides(tmp_path / "a")[1] != sides(tmp_path / "c")[1]


def test_split_of_a_prompt_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    prepare(write_jsonl(tmp_path / "few.jsonl", questions(100)), tmp_path / "few", "--val_fraction", "0.2")
    prepare(write_jsonl(tmp_path / "many.jsonl", questions(300)[::-1]), tmp_path / "many", "--val_fraction", "0.2")
    assert sides(tmp_path / "few")[1] == sides(tmp_path / "many")[1] & set.union(*sides(tmp_path / "few"))


@pytest.mark.parametrize(("fraction", "low", "high"), [(None, 70, 130), ("0.5", 940, 1060)])
def test_val_fraction_is_the_share_of_prompts(tmp_path: Path, fraction: str | None, low: int, high: int) -> None:
    """2,000 prompts: the default of 5 % is 100, give or take three standard deviations."""
    manifest = prepare_rows(tmp_path, questions(2000), *(["--val_fraction", fraction] if fraction else []))
    assert low <= manifest["val_examples"] <= high


def test_split_column_decides(tmp_path: Path) -> None:
    rows = [row(f"Question {number}", split="val" if number % 3 == 0 else "train") for number in range(30)]
    prepare_rows(tmp_path, rows)
    train, val = sides(tmp_path / "out")
    assert val == {prompt_text(f"Question {number}") for number in range(0, 30, 3)}
    assert len(train) == 20


SPLIT_CONFLICT = [row("Same", "one", split="train"), row("Other", split="val"), row("Same ", "two", split="val")]


def test_split_column_cannot_put_a_prompt_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl: line 3: this prompt stands in split 'train' already"):
        prepare_rows(tmp_path, SPLIT_CONFLICT)
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    assert prepare_rows(tmp_path, SPLIT_CONFLICT, "--skip_bad")["dropped"]["bad_row"] == 1
    assert sides(tmp_path / "out") == ({prompt_text("Same")}, {prompt_text("Other")})


@pytest.mark.parametrize("given_first", [True, False])
def test_rows_with_and_without_a_split_keep_a_prompt_on_one_side(tmp_path: Path, given_first: bool) -> None:
    """A row that names its split and one that leaves it to the hash may share a prompt; its side is then one all the
    same, or the second row is refused."""
    given = [row(f"Question {number}", "A", split=("train", "val")[number % 2]) for number in range(40)]
    hashed = [row(f"Question {number}", "B", split=None) for number in range(40)]
    prepare_rows(tmp_path, given + hashed if given_first else hashed + given, "--skip_bad", "--val_fraction", "0.5")
    train, val = sides(tmp_path / "out")
    assert train | val
    assert not train & val


def test_a_smaller_second_run_leaves_nothing_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_instruct_dataset, "SHARD_TOKENS", 100)
    prepare_rows(tmp_path, questions(60), "--val_fraction", "0.3")
    stray = tmp_path / "out" / "train" / "00000-dead.tokens.npy.tmp"
    stray.write_bytes(b"half a shard")
    (tmp_path / "out" / "notes.txt").write_text("the user's")
    before = len(files_of(tmp_path / "out"))
    manifest = prepare_rows(tmp_path, questions(20), "--val_fraction", "0.3")
    shards = sum(len(shards) for shards in manifest["shards"].values())
    assert len(files_of(tmp_path / "out")) == 3 * shards + 3 < before  # the manifest, .lock and notes.txt


@pytest.mark.parametrize("second", [[row("Broken", 7)], [row("Question 0")], []])
def test_a_failing_second_run_leaves_the_first_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     second: list[Row]) -> None:
    monkeypatch.setattr(prepare_instruct_dataset, "SHARD_TOKENS", 100)
    prepare_rows(tmp_path, questions(60), "--val_fraction", "0.3")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError):
        prepare_rows(tmp_path, second)
    after = files_of(tmp_path / "out")
    assert {name: after.get(name) for name in before} == before
    read_manifest(tmp_path / "out")


def test_shards_are_bounded_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most SHARD_TOKENS tokens a shard, except for one example that is longer, which has a shard of its own."""
    monkeypatch.setattr(prepare_instruct_dataset, "SHARD_TOKENS", 100)
    rows = [*questions(40), row("Long", "word " * 150), *[row(f"More {number}") for number in range(10)]]
    manifest = prepare_rows(tmp_path, rows, "--val_fraction", "0.3")
    shards = [shard for split in ("train", "val") for shard in manifest["shards"][split]]
    assert len(shards) > 5
    assert all(shard["tokens"] <= 100 or shard["examples"] == 1 for shard in shards)
    assert sum(shard["tokens"] > 100 for shard in shards) == 1
    assert Counter(example for split in ("train", "val") for example in examples_of(tmp_path / "out", split)
                   ) == expected_of(rows)


@pytest.mark.parametrize("fraction", ["0.000001", "0.99"])
def test_a_split_without_examples_is_refused(tmp_path: Path, fraction: str) -> None:
    with pytest.raises(UserError, match=r"no example for the (train|val) split \(1 kept of 3 read\)"):
        prepare_rows(tmp_path, [row(), row(), row("Empty", "")], "--val_fraction", fraction)


LENGTHS = [5, 1, 9, 9, 2, 7, 7, 7, 30, 4, 100]


def nearest_rank(lengths: list[int], percent: int) -> int:
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 95, 99, 100])
def test_percentiles_of_a_known_list(percent: int) -> None:
    assert percentile(Counter(LENGTHS), percent) == nearest_rank(LENGTHS, percent)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 100))
def test_percentiles_are_nearest_rank(lengths: list[int], percent: int) -> None:
    ordered = sorted(lengths)  # the definition in whole numbers; numpy's float quantiles can round at the border
    assert percentile(Counter(lengths), percent) == ordered[-(-percent * len(lengths) // 100) - 1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_histogram_counts_every_example_in_its_bin(lengths: list[int]) -> None:
    lines = [re.fullmatch(r" *(\d+) - (\d+) +(\d+) (#{0,50})", line) for line in histogram(Counter(lengths))]
    bins = [(int(line[1]), int(line[2]), int(line[3]), len(line[4])) for line in lines if line]
    assert len(bins) == len(lines) <= 10
    assert [(low, high) for low, high, *_ in bins] == [
        (number * (bins[0][1] + 1), (number + 1) * (bins[0][1] + 1) - 1) for number in range(len(bins))]
    assert [count for *_, count, _ in bins] == [sum(low <= n <= high for n in lengths) for low, high, *_ in bins]
    assert all((count > 0) == (bar > 0) for *_, count, bar in bins)


def test_report_tells_lengths_and_shows_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"Question {number}", "word " * number + "end") for number in range(1, 50)]
    manifest = prepare_rows(tmp_path, rows, "--val_fraction", "0.3")
    report = capsys.readouterr().out
    prompts = [len(tokenizer().encode_ordinary(prompt_text(row["instruction"]))) for row in rows]
    responses = [len(tokenizer().encode_ordinary(row["output"])) + 1 for row in rows]
    table = {"prompt": prompts, "response": responses, "total": [sum(pair) for pair in zip(prompts, responses)]}
    assert re.search(r"^tokens an example +p50 +p90 +p95 +p99 +max$", report, re.M)
    for name, lengths in table.items():
        figures = [str(nearest_rank(lengths, percent)) for percent in (50, 90, 95, 99, 100)]
        assert re.search(rf"^{name} +{' +'.join(figures)}$", report, re.M)
    assert f"trained on {100 * sum(responses) / sum(table['total']):.1f} % of the tokens" in report
    assert f"train      {manifest['train_examples']} examples, {manifest['train_tokens']:,} tokens" in report
    for number, first in enumerate(rows[:3], 1):
        assert (f"\nsample {number}, the trained part between >>> and <<<\n"
                f"{prompt_text(first['instruction'])}>>>{first['output']}<|endoftext|><<<\n") in report
    assert "sample 4" not in report


def test_samples_are_shortened_and_safe_to_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_rows(tmp_path, [row("Evil \x1b]0;title\x07", "x\x1b[2J" + "long " * 2000 + "end"), *questions(20)],
                 "--val_fraction", "0.3")
    report = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", report)
    assert r"Evil \x1b]0;title\x07" in report
    sample = report.split("sample 1,")[1].split("sample 2,")[0]
    assert len(sample) < 1000
    assert " [...] " in sample and "end<|endoftext|><<<" in sample


def test_the_real_alpaca_file(tmp_path: Path, alpaca: Path) -> None:
    manifest = prepare(alpaca, tmp_path / "out")
    assert manifest["total_examples"] == 999
    assert manifest["dropped"] == {"empty_output": 0, "exact_repeat": 14, "bad_row": 0}
    assert manifest["train_examples"] + manifest["val_examples"] == 985
    assert 25 <= manifest["val_examples"] <= 75
    examples = [example for split in ("train", "val") for example in examples_of(tmp_path / "out", split)]
    assert set(examples) == set(expected_of(json.loads(alpaca.read_text(encoding="utf-8"))))
    assert len(examples) == len(set(examples)) == 985
