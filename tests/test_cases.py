"""Small files that users have, which may not be copied into the project: what is right for each of them."""

import pytest

from conftest import ROOT
from data.rows import open_sources
from data.shapes import Example, Shapes, Turn
from errors import UserError
from helpers import prepare

CASES = ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there (its files may not be copied)")
WORDS = [Turn(f"Say the word number {n}.", "", f"word {n}") for n in range(60)]
THREE = [Turn("Name the plural.", "", "leaves"), Turn("Say hi.", "", "Hi there."), Turn("Name a colour.", "", "Blue.")]
ALPACA = [THREE[0]._replace(input="leaf"), *THREE[1:]]
BRIEF = [turn._replace(instruction=f"Be brief.\n\n{turn.instruction}") for turn in THREE]


def all_of(names: str, turns: list[Turn]) -> dict[str, list]:
    return dict.fromkeys(names.split(), turns)


# the turns of every row; rows with several turns are lists
RIGHT: dict[str, list] = {
    **all_of("all_without_input.json no_input.csv no_input.parquet some_without_input.json some_without_input.jsonl "
             "pandas_dict_nan.json true_nan.parquet list_in.jsonl list_in_pretty.jsonl one_object_data.json "
             "one_object_data_oneline.json one_object_train_val.json pandas_default.json pandas_columns.json "
             "utf16.jsonl utf16.json excel_utf16_tab.csv semicolon.csv semicolon_sep_line.csv tab.tsv "
             "header_case.csv header_spaces.csv rows.jsonl.gz rows.json.gz rows.ndjson rows.txt list_one_output.json "
             "split_names.jsonl split_test.jsonl with_system_history.json", WORDS),
    "tiny3.jsonl": WORDS[:3], "tiny10.jsonl": WORDS[:10],
    "nan_input.json": [turn._replace(input=f"text {n}" * (n % 2 == 0)) for n, turn in enumerate(WORDS)],
    "null_output.json": [turn._replace(output=turn.output * (n != 7)) for n, turn in enumerate(WORDS)],
    "dolly.jsonl": [Turn(f"Say {n}", f"ctx {n}" * (n % 2 == 0), f"word {n}") for n in range(60)],
    "prompt_completion.jsonl": [Turn(f"Say {n} ->", "", f" word {n}") for n in range(60)],
    "question_answer.jsonl": [Turn(f"Say {n}?", "", f"word {n}") for n in range(60)],
    "messages.jsonl": [Turn(f"Be brief.\n\nSay {n}", "", f"word {n}") for n in range(60)],
    "messages.parquet": [Turn(f"Say {n}", "", f"word {n}") for n in range(60)],
    "sharegpt.json": [[Turn(f"Say {n}", "", f"word {n}"), Turn("again", "", f"word {n} again")] for n in range(60)],
    "number_output.json": [Turn(f"What is {n} plus 1?", "", f"{n + 1}") for n in range(60)],
    "bool_output.json": [Turn(f"Is {n} even?", "", ("true", "false")[n % 2]) for n in range(60)],
    "int_output.parquet": [turn._replace(output=f"{n}") for n, turn in enumerate(WORDS)],
    "leading_space_code.jsonl": [turn._replace(output=f"    def f():\n        return {n}")
                                 for n, turn in enumerate(WORDS)],
    **all_of("alpaca.csv alpaca.jsonl.gz alpaca.parquet alpaca_cleaned.json alpaca_excel_semicolon.csv "
             "alpaca_gpt4.parquet alpaca_utf16.jsonl code_alpaca.json dolly_15k.jsonl gpteacher.json "
             "wrapped_data.json part1.jsonl", ALPACA),
    **all_of("alpaca_noinput.csv camel_ai.jsonl capybara.jsonl dolly_hhrlhf.parquet faq.csv flan.jsonl lima.jsonl "
             "no_robots.parquet openai_legacy_prompt_completion.jsonl sharegpt_v3.json tulu_3_sft.parquet "
             "wizardlm_evol_70k.json wizardlm_evol_v2_196k.json", THREE),
    "openai_chat.jsonl": BRIEF, "openhermes_2.5.json": BRIEF,
    "alpaca_bom.csv": [Turn("Say hi.", "", "Hi"), Turn("Say bye.", "", "Bye"), Turn("Say no.", "", "No")],
    "part2.jsonl": [turn._replace(instruction=f"b{turn.instruction}") for turn in ALPACA],
    "openorca.parquet": [turn._replace(instruction=f"You are an AI assistant.\n\n{turn.instruction}")
                         for turn in THREE],
    "smoltalk.parquet": [turn._replace(instruction=f"You are helpful.\n\n{turn.instruction}") for turn in THREE],
    "ultrachat_200k.parquet": [[turn, Turn("More?", "", "Yes.")] for turn in THREE],
}
REFUSED = {
    "both_empty.jsonl": r"nothing to train on \(60 read, 0 kept; .*, 60 empty question\)",
    "cp1252.csv": r"line 2: not UTF-8: byte 0x80 .*iconv -f",
    "cp1252.jsonl": r"line 1: not UTF-8: byte 0xe9 .*iconv -f",
    "gbk.json": r"line 1: not UTF-8: byte 0x.. .*iconv -f", "questions_latin1.txt": r"line 1: not UTF-8: byte 0xe9",
    "list_output.json": "row 1: column 'output' must be text, found \\['",
    "dict_output.json": "row 1: column 'output' must be text, found {'",
    "unclosed_quote.csv": "line 22: .*quote",
    **dict.fromkeys(("oasst1.jsonl", "oasst_guanaco.jsonl"), "a variant of the data with messages or pairs, such as "),
}
KEPT = ["emoji_rtl.jsonl", "template_in_output.jsonl",
        "run_on_outputs.json"]  # ordinary rows; others look at the answers


@pytest.mark.parametrize("name", RIGHT)
def test_cases_are_read_right(name):
    expected = [Example(tuple(row) if isinstance(row, list) else (row,)) for row in RIGHT[name]]
    rows = Shapes({"split": ""}).examples(open_sources([str(CASES / name)], {}))
    assert [row for _, row in rows] == expected


def test_cases_with_splits_tiny_ones_and_parts(tmp_path):
    found = {name: prepare(CASES / name, tmp_path / "out") for name in (
        "split_names.jsonl", "split_test.jsonl", "one_object_train_val.json", "tiny3.jsonl", "null_output.json", *KEPT)}
    assert [(manifest["train_examples"], manifest["val_examples"]) for manifest in list(found.values())[:4]] == [
        (54, 6), (53, 1), (50, 10), (2, 1)]
    assert found["split_test.jsonl"]["dropped"]["test_split"] == 6
    assert found["null_output.json"]["dropped"]["empty_output"] == 1
    assert prepare(CASES / "part1.jsonl", tmp_path / "out", "--dataset", CASES / "part1.jsonl",
                   CASES / "part2.jsonl")["total_examples"] == 6


@pytest.mark.parametrize("name", REFUSED)
def test_cases_that_are_refused_say_why(tmp_path, name):
    with pytest.raises(UserError, match=REFUSED[name]) as refused:
        prepare(CASES / name, tmp_path / "out")
    assert "--skip_bad" not in str(refused.value)


def test_every_case_is_looked_at():
    assert {path.name for path in CASES.iterdir()} - {"EXPECTED.md"} == {*RIGHT, *REFUSED, *KEPT}
