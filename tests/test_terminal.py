"""Chat at a real terminal, and what of it can be read later."""

import json
import sys

from conftest import ROOT, SRC, run_command
from helpers import rows_of
from instruct_format import encode_prompt


def test_every_situation_at_a_terminal(tmp_path):
    """The tables of keyboard.py; then what /save wrote is prepared like any other file."""
    code, stdout, stderr = run_command(sys.executable, ROOT / "tests" / "keyboard.py", tmp_path,
                                       env={"PYTHONPATH": str(SRC)}, timeout=600)
    situations = stdout.splitlines()
    assert code == 0, f"{situations[-1]}: {stderr}"
    assert len(situations) > 150
    turns = [turn[:3] for row in rows_of(tmp_path / "saved.jsonl") for turn in row.turns]
    assert turns[0] == ("One?", "", " word word") and ("One?", "some text", " word word") in turns
    assert [turn[:3] for row in rows_of(tmp_path / "half.jsonl") for turn in row.turns] == [("Two?", "", " word word")]
    messages = json.loads((tmp_path / "conversation.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 5
    [[_, asked]] = [row.turns for row in rows_of(tmp_path / "asked.jsonl")]  # its prompt is the one that was answered
    assert encode_prompt(asked.instruction) == encode_prompt("Two?", "leaf")
    assert messages[:2] == [{"role": "user", "content": "One?"}, {"role": "assistant", "content": " word word"}]
