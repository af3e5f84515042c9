"""The template and the tokenizer: exact text, one prompt for training and chat, a mask born right."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SRC, Outcome, run_command
from data_files import LOOKALIKES
from instruct_format import END_OF_TEXT, encode_example, encode_prompt, prompt_text, tidy, tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(LOOKALIKES)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(instruction=TEXTS, input=TEXTS, output=TEXTS)
def test_any_text_keeps_the_contract(instruction: str, input: str, output: str) -> None:
    tokens, mask = encode_example(instruction, input, output)
    prompt = encode_prompt(instruction, input)
    assert tokens[:len(prompt)] == prompt  # what chat sends
    assert mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    assert tokens.index(END_OF_TEXT) == len(tokens) - 1  # the last token, and no other
    decoded = tokenizer().decode_bytes(tokens).decode()
    assert decoded == prompt_text(instruction, input) + tidy(output) + "<|endoftext|>"
    assert encode_prompt(tidy(instruction), tidy(input)) == prompt and tidy(output).split() == output.split()


def test_the_template_with_and_without_input() -> None:
    """Fields lose blank lines around them and blanks at their end; inside, only CR LF becomes a newline."""
    assert prompt_text("\n Do  this.\t", "  a\r\n\r\r\n b \r\n") == (
        "### Instruction:\n Do  this.\n\n### Input:\n  a\n\n b\n\n### Response:\n")
    assert tidy(" \t\r\n\n    def f():\r\n        return 0\n \n") == "    def f():\n        return 0"
    for empty in ("", " ", "\n\t ", "\u3000"):
        assert prompt_text("Sing.", empty) == "### Instruction:\nSing.\n\n### Response:\n"


OFFLINE = """import socket
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = None  # to connect is a TypeError
from cli import run
from instruct_format import encode_prompt
run(lambda: print(encode_prompt("Hi")) or 0)"""


def encode_offline(folder: Path, damage: Callable[[Path, bytes], object]) -> Outcome:
    """Encode two letters, as a script would, with a copy of src whose ranks are damaged, and no network."""
    src = shutil.copytree(SRC, folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    [ranks] = (path for path in (src / "gpt2_ranks").iterdir() if path.suffix == "")
    damage(ranks, ranks.read_bytes())
    return run_command(sys.executable, "-c", OFFLINE, env={"PYTHONPATH": str(src)})


def test_no_network_is_needed(tmp_path: Path) -> None:
    assert encode_offline(tmp_path, lambda *_: None) == Outcome(0, f"{encode_prompt('Hi')}\n", "")


@pytest.mark.parametrize("damage", [
    lambda ranks, data: ranks.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]),
    lambda ranks, data: ranks.write_bytes(data[:len(data) // 2]),
    lambda ranks, data: ranks.unlink(),
    lambda ranks, data: shutil.rmtree(ranks.parent),
], ids=["flipped bit", "truncated", "missing", "no folder"])
def test_damaged_ranks_are_one_line_and_exit_code_2(tmp_path: Path, damage: Callable[[Path, bytes], object]) -> None:
    said = encode_offline(tmp_path, damage).refusal()
    assert "/gpt2_ranks/" in said and ": the tokenizer's ranks are missing or damaged; restore them with" in said
