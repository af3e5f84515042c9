"""Chat: one answer or a conversation, text that streams in whole characters and never drives the terminal, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chat
import checkpoint
import cli
import generate
from conftest import SRC, TIMEOUT, Outcome, run_script, write_checkpoint
from instruct_format import END_OF_TEXT, TEMPLATE, encode_prompt, tokenizer
from model import GPT, GPTConfig

Ask = Callable[..., Outcome]
RAW_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def ask(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run chat in this process with the tiny model; stdin is what a pipe would hold."""

    def run(*flags: str, stdin: str | io.TextIOBase = "", checkpoint: Path = tiny_checkpoint) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: chat.main(["--checkpoint", str(checkpoint), "--max_new_tokens", "8", *flags]))
        return Outcome(int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[list[int]]]:
    """Make the model answer with the tokens given. Returns the list of prompts that it will have been asked."""

    def install(tokens: list[int]) -> list[list[int]]:
        prompts: list[list[int]] = []

        def fake(model: GPT, prompt: list[int], max_new_tokens: int, *_: object) -> Iterator[int]:
            prompts.append(list(prompt))
            yield from tokens[:max_new_tokens]

        monkeypatch.setattr(generate, "generate", fake)
        return prompts

    return install


def test_prompt_is_answered_once(tiny_checkpoint: Path) -> None:
    code, stdout, stderr = run_script("chat.py", "--checkpoint", tiny_checkpoint, "--prompt", "Hi", "--seed", "1",
                                      "--max_new_tokens", "5", stdin="never read\n")
    assert code == 0
    assert stdout.endswith("\n") and stdout.strip()
    assert stderr == f"{tiny_checkpoint}: step 3, val loss 4.2500, on cpu; /help lists the commands\n"


def test_json_is_one_line_with_everything(ask: Ask) -> None:
    code, stdout, _ = ask("--prompt", "Say 'é'", "--input", "x\ny", "--json", "--seed", "1")
    assert (code, stdout.count("\n")) == (0, 1)
    answer = json.loads(stdout)
    assert answer.pop("response") and answer.pop("seconds") >= 0
    assert answer == {"instruction": "Say 'é'", "input": "x\ny", "tokens": 8, "stopped": "length"}


def test_json_and_streamed_text_agree(ask: Ask) -> None:
    streamed = ask("--prompt", "Hi", "--seed", "5").stdout
    assert json.loads(ask("--prompt", "Hi", "--seed", "5", "--json").stdout)["response"] + "\n" == streamed


def test_the_model_is_asked_with_the_prompt_of_training(ask: Ask, answers: Callable) -> None:
    prompts = answers([])
    ask("--prompt", " Do <|endoftext|> this\n", "--input", " it ")
    ask("--prompt", "Do this")
    assert prompts == [encode_prompt("Do <|endoftext|> this", "it"), encode_prompt("Do this")]


def test_a_seed_makes_answers_reproducible(ask: Ask) -> None:
    first, again, other = (ask("--prompt", "Hi", "--seed", seed).stdout for seed in "778")
    assert first == again != other


def test_without_a_seed_answers_differ(ask: Ask) -> None:
    assert len({ask("--prompt", "Hi").stdout for _ in range(5)}) > 1


def test_temperature_0_is_deterministic(ask: Ask) -> None:
    answers = {ask("--prompt", "Hi", "--temperature", "0", "--seed", seed).stdout for seed in "123"}
    assert len(answers) == 1
    assert answers == {ask("--prompt", "Hi", "--top_k", "1").stdout}


@pytest.mark.parametrize(("length", "tokens", "stopped"), [(3, 3, "end"), (8, 8, "length"), (9, 8, "length")])
def test_json_says_why_an_answer_stopped(ask: Ask, answers: Callable, length: int, tokens: int, stopped: str) -> None:
    answers(tokenizer().encode_ordinary(" word") * length)
    answer = json.loads(ask("--prompt", "Hi", "--json").stdout)
    assert (answer["response"], answer["tokens"], answer["stopped"]) == (" word" * tokens, tokens, stopped)


def test_the_end_token_ends_the_answer_and_is_not_shown(ask: Ask, tmp_path: Path) -> None:
    """A model that always says <|endoftext|>: its embedding is the only one that the hidden state points at."""
    config = GPTConfig(context_length=64, n_layer=1, n_head=1, n_embd=32)
    weights = {name: torch.zeros_like(tensor) for name, tensor in GPT(config).state_dict().items()}
    weights["transformer.ln_f.bias"] = torch.ones(32)
    weights["transformer.wte.weight"][END_OF_TEXT] = 1.0
    path = write_checkpoint(tmp_path / "end.pt", model_config=vars(config), model=weights)
    answer = json.loads(ask("--prompt", "Hi", "--json", "--temperature", "0", checkpoint=path).stdout)
    assert (answer["response"], answer["tokens"], answer["stopped"]) == ("", 0, "end")


def conversation(ask: Ask, *lines: str, flags: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], Outcome]:
    outcome = ask("--json", *flags, stdin="".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")], outcome


def asked(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["instruction"], each["input"]) for each in found]


def test_piped_questions_are_answered_a_line_each(ask: Ask) -> None:
    found, outcome = conversation(ask, "One?", "", "  Two?  ", "/exit", "Three?")
    assert asked(found) == [("One?", ""), ("Two?", "")]
    assert (outcome.code, len(outcome.error_lines)) == (0, 1)  # the line that names the checkpoint


def test_input_goes_with_the_next_question_only(ask: Ask) -> None:
    found, _ = conversation(ask, "Zero?", "/input  some text ", "One?", "Two?", "/input gone", "/input", "Three?",
                            flags=("--input", "first"))
    assert asked(found) == [("Zero?", "first"), ("One?", "some text"), ("Two?", ""), ("Three?", "")]


def test_unknown_commands_are_told_and_not_answered(ask: Ask) -> None:
    found, outcome = conversation(ask, "/nonsense now", "/help", "One?")
    assert asked(found) == [("One?", "")]
    assert "unknown command /nonsense\n" in outcome.stdout
    assert outcome.stdout.count("/exit") == 2  # the list of commands, twice


def test_end_of_input_ends_the_chat(ask: Ask) -> None:
    assert ask(stdin="").code == 0
    found, outcome = conversation(ask, "A line without its newline")
    assert (outcome.code, len(found)) == (0, 1)
    assert ask("--json", stdin="no newline").stdout.count("\n") == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of Python in a UTF-8 and in the C locale
@pytest.mark.parametrize("stdin", [b"caf\xe9?\n", "One?\n".encode("utf-16")])
def test_input_that_is_not_utf8_is_one_line_or_answered(ask: Ask, stdin: bytes, errors: str) -> None:
    code, stdout, stderr = ask("--json", stdin=io.TextIOWrapper(io.BytesIO(stdin), "utf-8", errors))
    assert (code, stdout == "", len(stderr.splitlines())) == ((2, True, 2) if errors == "strict" else (0, False, 1))
    assert ("error: standard input is not UTF-8" in stderr) == (code == 2)


def test_a_prompt_that_is_not_utf8_is_answered(ask: Ask) -> None:
    assert json.loads(ask("--prompt", "caf\udce9?", "--json").stdout)["tokens"] == 8


TEXTS = ["\N{ROCKET}", "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}", "na\u00efve caf\u00e9", "\u6f22\u5b57",
         "\u0e44\u0e17\u0e22", "mixed \N{SNOWMAN} and plain"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_characters_are_streamed_whole(tiny_checkpoint: Path, answers: Callable, text: str) -> None:
    tokens = tokenizer().encode_ordinary(text)
    answers(tokens)
    options = chat.parse_options(["--checkpoint", str(tiny_checkpoint)])
    answer = chat.Answer()
    pieces = list(chat.open_chat(options).stream("Hi", "", answer))
    assert "".join(pieces) == text == answer.text
    assert len(pieces) == len(tokens) + 1  # as the tokens come, and the end


def test_a_character_that_never_becomes_whole_is_shown_as_such(ask: Ask, answers: Callable) -> None:
    answers([*tokenizer().encode_ordinary("ok "), tokenizer().encode_ordinary("\N{ROCKET}")[0]])
    assert ask("--prompt", "Hi").stdout == "ok \ufffd\n"


ESC = "\x1b"
PAYLOADS = [
    f"{ESC}[2J", f"{ESC}[H", f"{ESC}[31mred{ESC}[0m", f"{ESC}[1A{ESC}[2K", f"{ESC}[?1049h", f"{ESC}[?25l", f"{ESC}c",
    f"{ESC}]0;title\x07", f"{ESC}]52;c;ZXZpbA==\x07", f"{ESC}]8;;http://evil{ESC}\\click{ESC}]8;;{ESC}\\", f"{ESC}[6n",
    f"{ESC}[c", f"{ESC}P+q544e{ESC}\\", f"{ESC}_Gi=31;{ESC}\\", f"{ESC}^x{ESC}\\", f"{ESC}[5i", f"{ESC}(0", f"{ESC}#8",
    f"{ESC}[200~rm -rf{ESC}[201~", "\x9b2J", "\x9d0;title\x9c", "\x90x\x9c", "\x85next", "\x07", "over\rwritten",
    "back\x08space", "\x0e\x0f", "\x7f", "right\u202eleft", "\u2066isolate\u2069", "line\u2028break", "\x00nul",
]


def check_safe(outcome: Outcome) -> None:
    assert not RAW_CONTROLS.search(outcome.stdout + outcome.stderr)


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_the_models_output_never_drives_the_terminal(ask: Ask, answers: Callable, payload: str) -> None:
    answers(tokenizer().encode_ordinary(f"x{payload}y"))
    for flags in ([], ["--json"]):
        outcome = ask("--prompt", "Hi", "--max_new_tokens", "100", *flags)
        check_safe(outcome)
        assert outcome.code == 0
        shown = json.loads(outcome.stdout)["response"] if flags else outcome.stdout[:-1]
        assert shown == cli.printable(f"x{payload}y")
        assert not RAW_CONTROLS.search(shown)


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "\x00" not in payload], ids=ascii)
def test_file_names_never_drive_the_terminal(ask: Ask, tmp_path: Path, payload: str) -> None:
    path = tmp_path / f"x{payload.replace('/', '|')}\n.pt"
    outcome = ask(checkpoint=path)
    check_safe(outcome)
    assert (outcome.code, len(outcome.error_lines)) == (2, 1)
    path.write_bytes(b"junk")
    outcome = ask(checkpoint=path)
    check_safe(outcome)
    assert (outcome.code, len(outcome.error_lines)) == (3, 1)
    assert cli.printable_line(path) in outcome.stderr


@pytest.fixture(scope="module")
def small_state() -> dict[str, Any]:
    """The parts of a checkpoint with a vocabulary of 8, which chat can load but has no use for."""
    config = GPTConfig(context_length=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config)
    model.init_weights(seed=0)
    return {"step": 3, "val_losses": [[3, 4.25]], "template": TEMPLATE, "model_config": vars(config),
            "model": model.state_dict()}


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_checkpoint_metadata_never_drives_the_terminal(ask: Ask, tmp_path: Path, small_state: dict[str, Any],
                                                       payload: str) -> None:
    model, path = small_state["model"], tmp_path / "evil.pt"
    first, *others = model
    hostile: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"template": payload}, (3,)),
        ({"step": payload}, (0, 3)),
        ({"format_version": payload}, (3,)),
        ({"model_config": {payload: 1}}, (3,)),
        ({"model_config": {**small_state["model_config"], "n_layer": payload}}, (3,)),
        ({"model": {**{name: model[name] for name in others}, payload: model[first]}}, (3,)),
    ]
    for change, codes in hostile:
        checkpoint.save(path, {**small_state, **change})
        outcome = ask(stdin="", checkpoint=path)
        check_safe(outcome)
        assert (outcome.code in codes, len(outcome.error_lines)) == (True, 1)


@pytest.mark.parametrize("change", [
    {"val_losses": None}, {"val_losses": [["3", "4"]]}, {"val_losses": [[3, "4.2"]]}, {"val_losses": 7},
    {"model": None}, {"model": []}, {"model": {"a": 1}}, {"model_config": None}, {"model_config": [1]},
    {"template": 7}, {"template": ["x"]},
], ids=str)
def test_checkpoint_metadata_of_another_type_is_exit_code_3(ask: Ask, tmp_path: Path, small_state: dict[str, Any],
                                                            change: dict[str, Any]) -> None:
    """A file with a fitting checksum can still hold anything."""
    path = tmp_path / "odd.pt"
    checkpoint.save(path, {**small_state, **change})
    outcome = ask(stdin="", checkpoint=path)
    assert (outcome.code, len(outcome.error_lines)) == (3, 1)
    assert outcome.stderr.startswith(f"error: {path}: ")


@pytest.mark.parametrize("name", ["step", "val_losses", "template", "model_config", "model"])
def test_a_checkpoint_that_lacks_a_part_is_exit_code_3(ask: Ask, tmp_path: Path, small_state: dict[str, Any],
                                                       name: str) -> None:
    path = tmp_path / "part.pt"
    checkpoint.save(path, {key: value for key, value in small_state.items() if key != name})
    outcome = ask(stdin="", checkpoint=path)
    assert (outcome.code, len(outcome.error_lines)) == (3, 1)
    assert outcome.stderr.startswith(f"error: {path}: ")


LONG = "word " * 100  # more than the context of 64


def test_a_prompt_longer_than_the_context_is_exit_code_2(ask: Ask) -> None:
    code, stdout, stderr = ask("--prompt", LONG)
    assert (code, stdout) == (2, "")
    assert re.search(r"^error: the question has \d+ tokens, too many for a context of 64; shorten it$", stderr, re.M)


def test_in_a_conversation_it_is_an_error_line_and_the_chat_goes_on(ask: Ask) -> None:
    found, outcome = conversation(ask, LONG, f"/input {LONG}", "One?", "/input", "Two?")
    assert asked(found) == [("Two?", "")]
    assert outcome.code == 0
    assert [line.startswith("error: the question has") for line in outcome.error_lines] == [False, True, True]


def test_a_prompt_that_nearly_fills_the_context_is_answered(ask: Ask) -> None:
    """64 tokens: a prompt of 63 leaves room for one, a prompt of 64 for none."""
    rest = 63 - len(encode_prompt("word"))
    question = "word" + " word" * rest
    assert len(encode_prompt(question)) == 63
    assert json.loads(ask("--prompt", question, "--json").stdout)["tokens"] == 1
    assert ask("--prompt", question + " word").code == 2


def refusal(ask: Ask, path: Path) -> tuple[int, str]:
    outcome = ask("--prompt", "Hi", checkpoint=path)
    assert (outcome.stdout, len(outcome.error_lines)) == ("", 1)
    assert outcome.stderr.startswith(f"error: {path}")
    return outcome.code, outcome.stderr


def test_a_missing_checkpoint_is_exit_code_2(ask: Ask, tmp_path: Path) -> None:
    assert refusal(ask, tmp_path / "missing.pt") == (2, f"error: {tmp_path}/missing.pt: no such checkpoint\n")
    assert refusal(ask, tmp_path)[0] == 2


def test_without_any_checkpoint_chat_says_how_to_get_one(tmp_path: Path) -> None:
    code, stdout, stderr = run_script("chat.py", "--prompt", "Hi", cwd=tmp_path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "no checkpoint in checkpoints_instruct: fine-tune first" in stderr and "demo" in stderr


def test_the_best_checkpoint_is_taken_before_the_latest(tiny_checkpoint: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints_instruct"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "latest.pt").symlink_to(tiny_checkpoint)
    assert chat.find_checkpoint(None).name == "latest.pt"
    (folder / "best_model.pt").symlink_to(tiny_checkpoint)
    assert chat.find_checkpoint(None).name == "best_model.pt"


@pytest.mark.parametrize("place", [0.0, 0.001, 0.5, 0.9999, 1.0])
def test_one_flipped_bit_is_exit_code_3(ask: Ask, tiny_checkpoint: Path, tmp_path: Path, place: float) -> None:
    data = bytearray(tiny_checkpoint.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    assert refusal(ask, tmp_path / "damaged.pt")[0] == 3


@pytest.mark.parametrize("size", [0, 1, 100, -1, -1000])
def test_a_truncated_checkpoint_is_exit_code_3(ask: Ask, tiny_checkpoint: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "cut.pt").write_bytes(tiny_checkpoint.read_bytes()[:size])
    assert refusal(ask, tmp_path / "cut.pt")[0] == 3


def test_another_template_is_exit_code_3_and_both_are_named(ask: Ask, tmp_path: Path) -> None:
    code, message = refusal(ask, write_checkpoint(tmp_path / "other.pt", template="chatml/7"))
    assert code == 3
    assert "chatml/7" in message and TEMPLATE in message


def test_a_pretrained_model_is_exit_code_3(ask: Ask, tmp_path: Path, tiny_checkpoint: Path) -> None:
    code, message = refusal(ask, write_checkpoint(tmp_path / "ours.pt", template=None, step=0, val_losses=[]))
    assert (code, "a pre-trained model; fine-tune it first" in message) == (3, True)
    torch.save({"model": checkpoint.load(tiny_checkpoint)["model"]}, tmp_path / "theirs.pt")
    assert refusal(ask, tmp_path / "theirs.pt")[0] == 3


def interrupting(tokens: int) -> Callable[..., Iterator[int]]:
    """A model that is interrupted at its third token, and would answer with this many."""

    def fake(*_: object) -> Iterator[int]:
        for number in range(tokens):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield tokenizer().encode_ordinary(" word")[0]

    return fake


def test_an_interrupted_prompt_shows_what_there_is_and_is_exit_code_130(ask: Ask,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "generate", interrupting(8))
    before = signal.getsignal(signal.SIGINT)
    code, stdout, _ = ask("--prompt", "Hi", "--json")
    answer = json.loads(stdout)
    assert (code, answer["tokens"], answer["response"], answer["stopped"]) == (130, 3, " word" * 3, "interrupt")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_answer_does_not_end_the_conversation(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "generate", interrupting(8))
    found, outcome = conversation(ask, "One?", "Two?")
    assert [answer["stopped"] for answer in found] == ["interrupt", "interrupt"]
    assert outcome.code == 0


class Terminal:
    """chat.py in a pseudo-terminal, as a user at a keyboard has it."""

    def __init__(self, *flags: str | Path) -> None:
        self.screen, terminal = os.openpty()
        settings = termios.tcgetattr(terminal)
        settings[3] &= ~termios.ECHO  # what comes back is what the program wrote
        termios.tcsetattr(terminal, termios.TCSANOW, settings)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, str(SRC / "chat.py"), *map(str, flags)], stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))  # makes it the controlling terminal
        os.close(terminal)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern shows; returns what came before its end and forgets it."""
        end = time.monotonic() + TIMEOUT
        while not (found := re.search(pattern, self.text, re.S)):
            ready, _, _ = select.select([self.screen], [], [], max(0.0, end - time.monotonic()))
            try:
                data = os.read(self.screen, 65536) if ready else b""
            except OSError:  # the other side is closed
                data = b""
            assert data, f"{pattern!r} did not show up after {self.text[-300:]!r}"
            self.text += data.decode(errors="replace")
        self.text, before = self.text[found.end():], self.text[:found.end()]
        return before

    def close(self) -> int:
        """Read what is left and wait for the end."""
        try:
            while select.select([self.screen], [], [], TIMEOUT)[0] and os.read(self.screen, 65536):
                pass
        except OSError:  # the other side is closed
            pass
        return self.process.wait(TIMEOUT)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose answers are 8,000 tokens long: seconds, so a key always comes in the middle of one."""
    path = write_checkpoint(tmp_path / "long.pt", context_length=8192)
    state = checkpoint.load(path)
    state["model"]["transformer.wte.weight"] = state["model"]["transformer.wte.weight"].clone()
    state["model"]["transformer.wte.weight"][END_OF_TEXT] = 0  # never the likeliest, so no answer ends early
    checkpoint.save(tmp_path / "endless.pt", state)
    terminal = Terminal("--checkpoint", tmp_path / "endless.pt", "--temperature", "0", "--max_new_tokens", "8000")
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()
        terminal.process.wait()
    os.close(terminal.screen)


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal) -> None:
    terminal.wait_for(r"/help lists the commands\r\n> ")
    answers = []
    for question in ("One?", "Two?"):
        terminal.type(f"{question}\n")
        terminal.wait_for(r"\S{3}")  # the answer has begun
        terminal.type("\x03")
        answers.append(terminal.wait_for(r"\r\n> $"))
    time.sleep(1)  # Python's readline misses a signal between showing the prompt and waiting for keys
    terminal.type("\x03")  # outside an answer it gives a new line
    terminal.wait_for(r"\r\n> $")
    terminal.type("/help\n")
    terminal.wait_for(r"Ctrl-C stops an answer\r\n> $")
    terminal.type("\x04")
    assert terminal.close() == 0
    assert all(len(answer) < 8000 for answer in answers)  # 8,000 tokens have more characters than that
