"""Preparation from a file to shards: what is kept, where it goes, what is written, and what is told."""

import hashlib
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, run_script, write_jsonl
from data.report import histogram, marked_sample
from data.shards import KINDS, MANIFEST, SPLITS, Document, open_prepared, shard_file
from data_files import HARD_ROWS, LOOKALIKES, Row, row
from errors import UserError
from helpers import expected_of, files_of, prepare, texts_of
from instruct_format import TEMPLATE, TOKENIZER, prompt_text, tokenizer


def questions(count: int, answers: int = 1) -> list[Row]:
    return [row(number, f"Answer {answer}") for answer in range(answers) for number in range(count)]


def prepare_rows(folder: Path, rows: list[Row], *flags: object) -> dict[str, Any]:
    return prepare(write_jsonl(folder / "data.jsonl", rows), folder / "out", *flags)


def sides(output: Path) -> list[set[str]]:
    return [{prompt for prompt, _ in texts} for texts in texts_of(output).values()]


def test_the_texts_come_back_from_the_shards_in_the_order_of_the_file(tmp_path):
    """Prepared by the script itself. What looks like the template, or like a special token, stays text."""
    rows = [*HARD_ROWS, *(row(n, **{name: text}) for n, text in enumerate(LOOKALIKES)
                          for name in ("instruction", "input", "output"))]
    flags = "--dataset", write_jsonl(tmp_path / "data.jsonl", rows), "--val_fraction", "0.3"
    code, stdout, stderr = run_script("prepare_instruct_dataset.py", *flags, "--output_dir", "my out", cwd=tmp_path)
    assert (code, stderr) == (0, "")
    assert "examples   71 read, 71 kept; dropped: 0 empty output, 0 exact repeat" in stdout
    out = tmp_path / "my out"
    assert stdout.endswith(
        f"\n\nwrote {out}/dataset_info.json; next: {ROOT}/start_instruct_training.sh --data_dir '{out}'\n")
    for part in (out / "train", out / "dataset_info.json"):
        with pytest.raises(UserError, match="a part of prepared data; name the whole folder: --data_dir '.*/my out'$"):
            open_prepared(part)
    (tmp_path / "dataset_info.json").write_text("of other data, which this folder lies in")
    assert open_prepared(out).manifest["train_examples"]
    (train, val), expected = texts_of(out).values(), expected_of(rows)
    assert [train, val] == [[text for text in expected if text in split] for split in (train, val)]
    assert sorted(train + val) == sorted(expected)


def test_manifest_has_what_the_contract_names(tmp_path):
    manifest = prepare_rows(tmp_path, questions(40), "--val_fraction", 0.25, "--seed", 7)
    assert manifest.items() >= {
        "format_version": 1, "template": TEMPLATE, "tokenizer": TOKENIZER, "source": "data.jsonl", "seed": 7,
        "val_fraction": 0.25, "total_examples": 40, "shape": "Alpaca", "multi_turn": False,
        "dropped": {"empty_output": 0, "exact_repeat": 0, "bad_row": 0},
    }.items()
    assert manifest["train_examples"] + manifest["val_examples"] == 40
    for split, [shard] in manifest["shards"].items():
        files = [shard_file(tmp_path / "out", split, shard, kind) for kind in KINDS]
        assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == list(shard["sha256"].values())
        tokens, mask, starts = map(np.load, files)
        assert (tokens.dtype, mask.dtype, starts.dtype) == (np.uint16, np.uint8, np.int64)
        counts = {"examples": len(starts), "tokens": len(tokens), "response_tokens": int(mask.sum())}
        assert counts == {key: shard[key] for key in counts} == {key: manifest[f"{split}_{key}"] for key in counts}


@pytest.mark.parametrize(("count", "remembers"), [(40, True), (41, False)])
def test_chat_remembers_if_one_in_twenty_has_several_turns(tmp_path, count, remembers):
    """Here two have."""
    rows = [{"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant") * (1 + (n < 2))]}
            for n in range(count)]
    assert prepare_rows(tmp_path, rows)["multi_turn"] == remembers


def test_what_is_dropped_is_counted_and_nothing_else_is_dropped(tmp_path):
    """Fields that only join to the same text are no repeats."""
    kept = [*questions(30), row(0, "another answer"), row(0, "Answer 0", instruction="question 0"),
            row(output="an input alone", instruction="", input="x"), row(1, "Answer 0", input="x"), row("ab", "c"),
            row("a", "bc"), row("a", "c", input="b"), row("NUL", "a\0b"), row("Letters", "a" * 1_000_000),
            row("Words", "word " * 600_000)]
    dropped = [row("Empty", ""), row("Empty", " \n"), row(2, "Answer 0"), row("3\n", "Answer 0 "),
               row(4, "Answer 0", input=None), row(instruction="", output="A"), row(instruction=None, output="A")]
    manifest = prepare_rows(tmp_path, kept + dropped, "--val_fraction", 0.3)
    assert manifest["dropped"] == {"empty_output": 2, "exact_repeat": 3, "bad_row": 0, "empty_question": 2}
    assert manifest["total_examples"] == len(kept) + len(dropped)
    assert sorted(chain(*texts_of(tmp_path / "out").values())) == sorted(expected_of(kept))


def test_output_is_byte_identical_for_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_instruct_dataset.BATCH_EXAMPLES", 7)
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 400)
    data = write_jsonl(tmp_path / "data.jsonl", [*questions(150, 2), *HARD_ROWS])
    for workers in (1, 3):
        prepare(data, tmp_path / str(workers), "--num_proc", workers)
    assert len(files_of(tmp_path / "1")) > 20
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_a_prompt_has_one_side_which_is_a_function_of_it_and_the_seed(tmp_path):
    found = []
    more = [*questions(300, 3)[::-1], *(row(f"{number} \n", "yet another") for number in range(100))]
    for rows, seed, prompts in ((questions(100), 42, 100), (more, 42, 300), (questions(100), 43, 100)):
        prepare_rows(tmp_path, rows, "--seed", seed, "--val_fraction", 0.2)
        train, val = sides(tmp_path / "out")
        assert not train & val and len(train | val) == prompts
        found.append(val)
    assert found[0] == found[1] & {prompt_text(row["instruction"]) for row in questions(100)} and found[0] != found[2]


@pytest.mark.parametrize(("flags", "low", "high"), [([], 70, 130), (["--val_fraction", 0.5], 940, 1060)])
def test_val_fraction_is_the_share_of_prompts(tmp_path, flags, low, high):
    """2,000 prompts: the default of 5 % is 100, give or take three standard deviations."""
    assert low <= prepare_rows(tmp_path, questions(2000), *flags)["val_examples"] <= high


NAMED = [row(n, split="train" if n % 3 else "val") for n in range(30)]


@pytest.mark.parametrize(("rows", "told", "bad"), [
    ([*NAMED, row("0 ", "B", split="train")], "line 31: this prompt stands in split 'val' already", 1),
    ([*NAMED, row(1, "B", split=None), row("New")], "line 31: column 'split' must be in every row", 2),
    ([*questions(70)[30:], *NAMED], "line 41: column 'split' must be in every row or in none", 30),
], ids=["both sides", "named first", "hashed first"])
def test_split_column_decides_and_cannot_put_a_prompt_on_both_sides(tmp_path, rows, told, bad):
    with pytest.raises(UserError, match=rf"data\.jsonl: {told}"):
        prepare_rows(tmp_path, rows)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert prepare_rows(tmp_path, rows, "--skip_bad", "--val_fraction", 0.5)["dropped"]["bad_row"] == bad
    train, val = sides(tmp_path / "out")
    assert len(train | val) == len(rows) - bad and not train & val
    if "split" in rows[0]:
        assert val == {prompt_text(f"Question {n}") for n in range(0, 30, 3)}


def test_a_failing_second_run_leaves_the_first_whole_and_a_smaller_one_nothing_stale(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 100)
    prepare_rows(tmp_path, questions(60), "--val_fraction", 0.3)
    (tmp_path / "out" / "train" / "00000-deaddeaddeaddead.tokens.npy.tmp").write_bytes(b"half a shard")
    (tmp_path / "out" / "notes.txt").write_text("the user's")
    before = files_of(tmp_path / "out")
    for failing in ([row("Broken", {"a": 1})], [row()], []):
        with pytest.raises(UserError):
            prepare_rows(tmp_path, failing)
        assert files_of(tmp_path / "out").items() >= before.items()
    manifest = prepare_rows(tmp_path, questions(20), "--val_fraction", 0.3)
    shards = sum(len(shards) for shards in manifest["shards"].values())
    assert len(files_of(tmp_path / "out")) == 3 * shards + 3 < len(before)  # the manifest, .lock and notes.txt


def test_shards_are_bounded_and_whole(tmp_path, monkeypatch):
    """At most SHARD_TOKENS tokens a shard, except for one example that is longer, which has a shard of its own."""
    monkeypatch.setattr("data.shards.SHARD_TOKENS", 100)
    rows = [row("Long", "word " * 150), *questions(40), *(row(f"More {number}") for number in range(10))]
    manifest = prepare_rows(tmp_path, rows, "--val_fraction", 0.3)
    shards = [shard for split in SPLITS for shard in manifest["shards"][split]]
    assert len(shards) > 5 and all(shard["examples"] for shard in shards)
    assert [shard["examples"] for shard in shards if shard["tokens"] > 100] == [1]
    assert sorted(chain(*texts_of(tmp_path / "out").values())) == sorted(expected_of(rows))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_histogram_counts_every_example_in_its_bin(lengths):
    lines = [re.fullmatch(r" *(\d+) - (\d+) +(\d+) (#{0,50})", line) for line in histogram(np.array(lengths))]
    bins = [(int(line[1]), int(line[2]), int(line[3]), len(line[4])) for line in lines if line]
    assert len(bins) == len(lines) <= 10 and sum(count for _, _, count, _ in bins) == len(lengths)
    size = bins[0][1] + 1
    for number, (low, high, count, bar) in enumerate(bins):
        assert (low, high) == (number * size, (number + 1) * size - 1)
        assert count == sum(low <= length <= high for length in lengths) and (count > 0) == (bar > 0)


def test_report_tells_lengths_and_shows_samples(tmp_path, capsys):
    rows = [row(number, "word " * number + "end") for number in range(1, 51)]
    manifest = prepare_rows(tmp_path, rows, "--val_fraction", 0.3)
    report = capsys.readouterr().out
    prompts = [len(tokenizer().encode_ordinary(prompt_text(row["instruction"]))) for row in rows]
    responses = [len(tokenizer().encode_ordinary(row["output"])) + 1 for row in rows]
    table = {"prompt": prompts, "response": responses, "total": [sum(pair) for pair in zip(prompts, responses)]}
    assert re.search(r"^tokens an example +p50 +p90 +p95 +p99 +max$", report, re.M)
    for name, lengths in table.items():  # the nearest rank: the smallest length that so many per cent do not exceed
        figures = [str(sorted(lengths)[-(-percent * len(lengths) // 100) - 1]) for percent in (50, 90, 95, 99, 100)]
        assert re.search(rf"^{name} +{' +'.join(figures)}$", report, re.M)
    assert f"trained on {100 * sum(responses) / sum(table['total']):.1f} % of the tokens" in report
    assert f"train      {manifest['train_examples']} examples, {manifest['train_tokens']:,} tokens" in report
    for number, first in enumerate(rows[:3], 1):
        assert (f"\nsample {number}, the trained part between >>> and <<<\n"
                f"{prompt_text(first['instruction'])}>>>{first['output']}<|endoftext|><<<\n") in report
    assert "sample 4" not in report


def test_every_trained_part_of_a_sample_is_marked_and_shortened():
    tokens = np.array(tokenizer().encode_ordinary(" one two three" + " long" * 2000 + " end"), dtype=np.uint16)
    sample = marked_sample(Document(tokens, np.array([0, 1, 0] + [1] * 2001, dtype=np.uint8)))
    assert re.fullmatch(r" one>>> two<<< three>>>( long)+.* \[\.\.\.\] .*( long)+ end<<<", sample) and len(sample) < 700
