"""What a row means: every form of questions, answers and conversations of public data, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest

from conftest import write_jsonl
from data.rows import Source
from data.shapes import Example, Shapes, Turn
from data.values import BadRow, Number
from data_files import Row
from errors import UserError
from helpers import open_data, prepare
from instruct_format import encode_conversation, encode_example, tokenizer, trained_spans

Turns = list[tuple[str, str, str] | tuple[str, str, str, bool]]
SYSTEM, USER, BOT = ({"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", "Name the plural."), ("assistant", "leaves")))
MORE, YES = {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Yes."}
PLAIN: Turns = [("Name the plural.", "", "leaves")]
BRIEF: Turns = [("Be brief.\n\nName the plural.", "", "leaves")]
CONTEXT: Turns = [(*PLAIN[0][:3], False), ("More?", "", "Yes.")]
TWO: Turns = [*PLAIN, ("More?", "", "Yes.")]
BOTH: Turns = [("Name the plural.\n\nMore?", "", "Yes.")]  # the first question has no answer
PAIR, PC = {"prompt": "P", "completion": "C"}, [("P", "", "C")]
QA, QARB = [("Q", "", "A")], [("Q", "", "A"), ("R", "", "B")]


def chat(*messages: Any, **more: Any) -> Row:
    return {"messages": list(messages), **more}


def said(*pairs: str, role: str = "from", text: str = "value") -> list[dict[str, str]]:
    """Messages from who says it and what, in turn."""
    return [{role: who, text: what} for who, what in zip(pairs[::2], pairs[1::2])]


def expected(turns: Turns) -> Example:
    return Example(tuple(Turn(*turn) for turn in turns))


# name -> (row, its turns, the shape)
SHAPES: dict[str, tuple[Row, Turns, str]] = {
    **{names: (dict(zip(names.split("/"), "QA")) | {"id": 1}, QA, names) for names in (
        "instruction/response", "prompt/completion", "question/answer", "inputs/targets", "input/output",
        "message_1/message_2", "problem/solution", "human/assistant")},
    "Alpaca": ({"instruction": "I", "input": "in", "output": "O", "text": "I in O"}, [("I", "in", "O")], "Alpaca"),
    "Dolly": ({"instruction": "I", "context": "c", "response": "R", "category": "x"}, [("I", "c", "R")], "Dolly"),
    "OpenOrca": ({"id": 1, "system_prompt": "S", "question": "Q", "response": "R"}, [("S\n\nQ", "", "R")], "OpenOrca"),
    "any case, blanks": ({" Prompt": "Q", "RESPONSE ": "A"}, QA, "prompt/response"),
    "a solution and its last line": ({"problem": "Q", "answer": "4", "solution": "A"}, QA, "problem/solution"),
    **{f"{value} as context": ({"instruction": "Q", "context": value, "response": "A"}, QA, "Dolly")
       for value in ([], {})},
    "data beside a pair": (PAIR | {"data": ["x"]}, PC, "prompt/completion"),
    **{f"a pair beside {value}": (PAIR | {"conversation": value}, PC, "prompt/completion")
       for value in ("[sighs] Hi", "[1, 2]", None)},
    "messages": (chat(USER, BOT, MORE, YES, id=1), TWO, "messages"),
    "messages and a pair": (chat(USER, BOT, **PAIR), PLAIN, "messages"),
    "no turn beside a pair": (chat({**USER, "content": ""}, **PAIR), PC, "messages and prompt/completion"),
    "a system column": (chat(USER, BOT, MORE, YES, system_prompt="Be brief."), [*BRIEF, TWO[1]], "messages"),
    "system in both places": (chat(SYSTEM, USER, BOT, system_prompt="Be brief."), BRIEF, "messages"),
    "not to train": (chat({**USER, "weight": 0}, {**BOT, "train": False}, MORE, YES), CONTEXT, "messages"),
    "weight 0.0 alone": (chat(USER, {**BOT, "weight": 0.0}), [], "messages"),
    "weight 0 and 1 in a row": (chat(USER, {**BOT, "weight": 0}, YES, MORE, YES),
                                [("Name the plural.", "", "leaves\n\nYes.", False), CONTEXT[1]], "messages"),
    "an input": (chat({**USER, "input": "leaf"}, {**BOT, "input": {}}), [("Name the plural.\n\n### Input:\nleaf", "",
                                                                         "leaves")], "messages"),
    "an input in parts": (chat({**USER, "input": ["a", "b"]}, {**BOT, "content": False}),
                          [("Name the plural.\n\n### Input:\na\nb", "", "false")], "messages"),
    "an input in turn": ({"conversation": [{"instruction": "Q", "input": "x", "output": "A"}]},
                         [("Q\n\n### Input:\nx", "", "A")], "questions and answers in turn"),
    "ShareGPT": ({"conversations": said("human", "Q", "gpt", "A", "human", "R", "gpt", "B")}, QARB, "ShareGPT"),
    "system, gpt first": ({"conversations": said("developer", "S", "gpt", "Hi!", "human", "Q", "gpt", "A")},
                          [("S\n\nQ", "", "A")], "ShareGPT"),
    "other speakers": ({"Conversation": said("Human", "Q", "BOT", "A", "prompter", "R", "model", "B", role="role")},
                       QARB, "messages"),
    "two questions in a row": (chat(USER, MORE, YES), BOTH, "messages"),
    "empty answer": (chat(SYSTEM, USER, {**BOT, "content": " \n"}, MORE, YES), [("Be brief.\n\nMore?", "", "Yes.")],
                     "messages"),
    "an answer after an empty one": (chat(USER, {**BOT, "content": ""}, BOT), PLAIN, "messages"),
    "empty question": (chat({**USER, "content": ""}, BOT), [("", "", "leaves")], "messages"),
    "a turn, then an empty question": (chat(USER, BOT, {**USER, "content": None}, YES, BOT), PLAIN, "messages"),
    "no question": ({"system_prompt": "S", "question": None, "response": "A"}, [("", "", "A")], "OpenOrca"),
    "an input is a question": ({"system_prompt": "S", "instruction": "", "input": "Q", "output": "A"},
                               [("S", "Q", "A")], "instruction/input/output/system_prompt"),
    "no messages": (chat(), [], ""), "null": ({"messages": None}, [], ""),
    "fields of other roles": (chat({**USER, "tool_calls": None, "from": None, "name": "x"}, BOT), PLAIN, "messages"),
    "Gemini": ({"messages": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
               QA, "messages"),
    "messages as JSON text": ({"messages": json.dumps([USER, BOT])}, PLAIN, "messages"),
    "messages as Python writes them": ({"messages": str([USER, BOT])}, PLAIN, "messages"),
    "a system text beside": (chat(USER, BOT, system="Be brief."), BRIEF, "messages"),
    "a system that is no text": (chat(USER, BOT, system={"os": "linux"}), PLAIN, "messages"),
    "texts beside a pair": (PAIR | {"contents": ["x", "y"]}, PC, "prompt/completion"),
    "Bedrock": (chat(USER, {**BOT, "content": [{"text": "leaves"}]}, system=[{"text": "Be brief."}]), BRIEF,
                "messages"),
    "Gemini's own": ({"systemInstruction": {"parts": [{"text": "S"}]}, "contents": [
        {"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
                     [("S\n\nQ", "", "A")], "messages"),
    "a list of messages": ([USER, BOT], PLAIN, "messages"),  # type: ignore[dict-item]
    "messages as question and answer": ({"prompt": [SYSTEM, USER], "completion": [BOT]}, BRIEF, "messages"),
    "messages as a question": ({"input": [USER, BOT, MORE], "output": "Yes.", "system_prompt": ""}, TWO, "messages"),
    "messages as an answer": ({"prompt": "Q", "output": [{"role": "assistant", "content": "A"}]}, QA, "messages"),
    "all messages as an answer": ({"prompt": "Name the plural.", "output": [SYSTEM, USER, BOT]}, BRIEF, "messages"),
    "pairs": ({"conversation": [["Q", "A"], ["R", "B"]]}, QARB, "texts in turn"),
    "a mark before a name": ({"\ufeffinstruction": "Q", "output": "A"}, QA, "Alpaca"),
    "Cohere": (chat({"role": "User", "message": "Q"}, {"role": "Chatbot", "message": "A"}), QA, "messages"),
    "LIMA": ({"conversations": ["Q", "A", "R", "B"], "source": "x"}, QARB, "texts in turn"),
    "UltraChat": ({"id": "0", "data": ["Q", "A"]}, QA, "texts in turn"),
    "Capybara": ({"conversation": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}]}, QARB,
                 "questions and answers in turn"),
    "a system text in turn": ({"conversation": [{"question": "Q", "answer": "A", "system_prompt": "S"}]},
                              [("S\n\nQ", "", "A")], "questions and answers in turn"),
    "indentation": ({"instruction": "\n  I", "input": "\t\r\n x\r\n", "output": "    def f():\r\n        pass \n\n"},
                    [("  I", " x", "    def f():\n        pass")], "Alpaca"),
    "empty values": ({"instruction": "I", "input": float("nan"), "output": None}, [("I", "", "")], "Alpaca"),
    "numbers as written": ({"instruction": Number("1e5"), "input": Number("1.0"), "output": Number("-0")},
                           [("1e5", "1.0", "-0")], "Alpaca"),
    "a list of one text": ({"instruction": "Q", "input": [""], "output": ["A"]}, QA, "Alpaca"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_recognised(name):
    row, turns, shape = SHAPES[name]
    shapes = Shapes({})
    assert (shapes.example(row), " and ".join(shapes.names)) == (expected(turns), shape)


DPO = {"prompt": "Q", "chosen": [USER, BOT]}
WHICH = "say which it is: --columns instruction=NAME output=NAME, or messages=NAME. The first line of a table"
REFUSED: dict[str, tuple[Any, str]] = {
    "one column": ({"instruction": "I", "x": "y"}, "no column for the output (found: 'instruction', 'x'); " + WHICH),
    "no column": ({}, "no column for the instruction and no column for the output (found: none)"),
    "an object as an answer": ({"prompt": "Q", "output": [{"text": "A"}]}, "'output' must be text, found [{'text'"),
    "many names": ({f"id{n}": PAIR for n in range(1000)}, "'id19', ...); " + WHICH),
    "one text": ({"text": "### Human: Hi### Assistant: Hi"}, "such as philschmid/guanaco-sharegpt-style"),
    "two": ({"instruction": "I", "output": ["a", "b"]}, "'output' must be text, found ['a', 'b']; make it one text"),
    "tools": (chat(USER, {"role": "tool", "content": "42"}, BOT),
              "column 'messages': message 2: role 'tool' is none of user, assistant and system"),
    "an unknown text": (chat({"role": "user", "says": "Hi"}, BOT), "no role and content (found: 'role', 'says')"),
    "no role": (chat({"content": "Hi"}, BOT), "message 1 has no role and content (found: 'content')"),
    "a picture": (chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, BOT),
                  "column 'messages': message 1 has a part that is no text: {'image_url': 'x'"),
    "a text": ({"dialogue": "A: Hi", "summary": "x"}, "column 'dialogue' must be a list of messages, found 'A: Hi'; "
               "the columns are 'dialogue', 'summary'; " + WHICH),
    "NumPy's writing": ({"messages": "[{'role': 'user'}\n {'role': 'bot'}]"}, "must be a list of messages, found \"["),
    **{f"Python's {text:.20}": ({"messages": f"[{{'content': {text}}}]"}, "; write it as JSON, or save the data as .js")
       for text in ("{[]: 1}", "{[]}", "0x" + "f" * 5000, "b''", "1j", "x" * 9, "(" * 99)},
    "code": ({"messages": "[print('x')]"}, "; write it as JSON, or save the data as .jsonl or .parquet"),
    "numbers": (chat(1, 2), "message 1 must be an object with role and content, found 1"),
    "a surrogate": (chat({**USER, "content": "\ud800"}, BOT), "message 1 has half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name):
    row, reason = REFUSED[name]
    with pytest.raises(BadRow) as refused:
        Shapes({}).example(row)
    assert reason in str(refused.value)


@pytest.mark.parametrize(("columns", "row", "turns"), [
    ({"instruction": "frage", "output": "antwort"}, {"Frage ": "Q", "antwort": "A", "output": "x"}, QA),
    ({"instruction": "query", "output": "answer"}, {"prompt": "x", "query": "Q", "output": "y", "answer": "A"}, QA),
    ({"instruction": "prompt", "output": "completion"}, chat(USER, BOT, **PAIR), PC),
    ({"messages": "chosen"}, DPO, PLAIN),
    ({"messages": "chosen"}, {**DPO, "prompt": [MORE], "completion": [YES]}, PLAIN),
    ({"messages": "log"}, {"log": [USER, BOT], "instruction": "I", "output": "O"}, PLAIN),
    ({"input": ""}, {"instruction": "Q", "input": "in", "": "7", "output": "A"}, QA),
    ({"input": "hint", "system": "system"}, {"instruction": "I", "hint": "h", "output": "O", "system": "S"},
     [("S\n\nI", "h", "O")]),
    ({"system": "system"}, chat(USER, BOT, system="Be brief."), BRIEF),
    ({"input": "hint"}, {"instruction": "Q", "output": "A"}, QA),
    ({"split": ""}, {"instruction": "Q", "output": "A", "split": "val"}, QA),
])
def test_columns_that_the_user_names_win(columns, row, turns):
    assert Shapes(columns).example(row) == expected(turns)


def test_columns_that_no_row_has_are_refused(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"frage": "Q", "antwort": "A"}, {"frage": "R", "antwort": "B"}])
    pair = ["instruction=Frage", "output=antwort"]
    assert prepare(data, tmp_path, "--columns", pair[0], "--columns", pair[1])["train_examples"] == 1
    turns = [{"conversation": [{"frage": f"Q{n}", "antwort": "A"}]} for n in range(2)]  # messages have them too
    in_turn = prepare(write_jsonl(tmp_path / "b.jsonl", turns), tmp_path, "--columns", "messages=conversation", *pair)
    assert in_turn["train_examples"] == 1
    for flags, reason in ((["instruction=x"], "a.jsonl: line 1: no column 'x' and no column for the output"),
                          (pair[:1], "line 1: no column for the output"),
                          ([pair[0], "output=nope"], "no column 'nope' .found: 'frage', 'antwort'.; say which"),
                          ([*pair, "input=kontext"], "a.jsonl: --columns: no row has a column 'kontext'"),
                          ([*pair, "output=frage"], "--columns: a meaning has one column"),
                          (["x"], "'x' is not MEANING=NAME with a MEANING of messages, instruction, output")):
        with pytest.raises(UserError, match=reason):
            prepare(data, tmp_path, "--columns", *flags)


def test_the_first_value_says_whether_a_column_is_a_split():
    names = {"train": "train", "Training": "train", " val": "val", "validation": "val", "VALID": "val", "dev": "val",
             "eval": "val", "test": "test", "train_sft": "train", "Test_gen": "test", "validation_set": "val"}
    for first in names:
        shapes = Shapes({})
        assert {name: shapes.example({"prompt": "P", "answer": "A", "Split": name}).split
                for name in (first, *names)} == {first: names[first], **names}
        assert all(shapes.example({"prompt": "P", "answer": "A", "Split": nothing}).split is None
                   for nothing in (None, "", float("nan")))
        with pytest.raises(BadRow, match="'Split' must be train, val or test, found 'gpt4'"):
            shapes.example({"prompt": "P", "answer": "A", "Split": "gpt4"})
    with pytest.raises(BadRow, match="'part' must be train, val or test, found 'gpt4'"):  # a user's word always wins
        Shapes({"split": "part"}).example({"prompt": "P", "answer": "A", "part": "gpt4"})
    other = Shapes({})
    assert [other.example({"prompt": "P", "answer": "A", "split": value}).split
            for value in (None, "", float("nan"), "gpt4", "train", 3, ["val"])] == [None] * 7


def test_a_conversation_is_one_example_after_another():
    turns = [("Add 1 to 2.", "", "3"), ("And to it 4?", "fast", " 7\n"), ("Bye.", "", "Bye.")]
    expected = [encode_example(*turn) for turn in turns]
    tokens, mask = encode_conversation(turns)
    assert (tokens, mask) == tuple(sum(parts, []) for parts in zip(*expected))
    assert [tokenizer().decode(tokens[start:stop]) for start, stop in trained_spans(mask)] == [
        "3<|endoftext|>", " 7<|endoftext|>", "Bye.<|endoftext|>"]
    assert encode_conversation(turns[:1]) == encode_example(*turns[0])
    assert trained_spans([]) == [] and trained_spans(np.array([1, 1, 0, 1, 0], np.uint8)) == [(0, 2), (3, 4)]


def test_several_turns_reach_the_shards_and_the_report(tmp_path, capsys):
    """One document, each answer trained; repeats and sides go by the first prompt and by everything."""
    row = {"id": 7, "messages": [SYSTEM, USER, BOT, MORE, YES], "tools": []}
    again = {"id": 8, "messages": [SYSTEM, USER, BOT, MORE, {**YES, "content": "No."}]}
    others = [{"messages": said("user", f"Q{n}", "assistant", "A", role="role", text="content")} for n in range(3)]
    gpt_first = {"messages": [BOT, *others[0]["messages"], MORE]}
    unasked = [{"messages": [BOT]}, {"instruction": None, "output": "A"}]
    rows = [row, {**row, "id": 9}, again, *others, gpt_first, {"messages": [USER]}, *unasked]
    manifest = prepare(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert manifest["dropped"] == {"empty_output": 1, "exact_repeat": 2, "bad_row": 0, "empty_question": 2}
    assert (manifest["shape"], manifest["multi_turn"], manifest["total_examples"]) == ("messages and Alpaca", True, 10)
    report = capsys.readouterr().out
    assert report.startswith("shape: messages and Alpaca, 1.4 turns on average; columns used: messages, instruction, "
                             "output; ignored: id, tools\n2 answers without a question left out\n"
                             "2 questions without an answer left out\n")
    [sides] = ({split: [tuple(map(list, data.example(n))) for n in range(len(data))] for split, data in each.items()}
               for each in [open_data(tmp_path / "out")])
    documents = [encode_conversation(turns) for turns in (
        [BRIEF[0], TWO[1]], [BRIEF[0], ("More?", "", "No.")], *([(f"Q{n}", "", "A")] for n in range(3)))]
    assert sorted(map(tuple, sides["train"] + sides["val"])) == sorted(documents)
    assert (documents[0] in sides["train"]) == (documents[1] in sides["train"])
    assert ("### Instruction:\nBe brief.\n\nName the plural.\n\n### Response:\n>>>leaves<|endoftext|><<<"
            "### Instruction:\nMore?\n\n### Response:\n>>>Yes.<|endoftext|><<<\n") in report


def test_what_was_changed_is_counted_and_shapes_may_be_mixed():
    shapes = Shapes({})
    rows = [{"instruction": 1, "output": ["O<|endoftext|>"]}, {"prompt": "P", "completion": True, "id": 0},
            {"messages": [USER, BOT, YES | {"weight": 0}]}]
    found = list(shapes.examples([Source("a.json", iter([("row 1", rows[0]), ("row 2", 7)])),
                                  Source("b.json", iter([("row 1", "x"), ("row 2", rows[1]), ("row 3", rows[2])]))]))
    assert [getattr(row, "advice", None) for _, row in found] == [None, " (--skip_bad drops such rows)", "", None, None]
    assert shapes.notes(1.0) == [
        "shape: Alpaca and prompt/completion and messages; columns used: instruction, output, "
        "prompt, completion, messages; ignored: id", "2 numbers and booleans became text",
        "1 texts contain <|endoftext|>, which is trained as text and ends nothing: remove it",
        "1 answers of weight 0 are context only"]
