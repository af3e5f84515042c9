"""Chat: one answer or a conversation, text that streams in whole characters and never drives the terminal, Ctrl-C."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import answering.answer
import chat
import cli
from answering.settings import Settings
from conftest import SRC, TIMEOUT, Outcome, write_checkpoint
from errors import UserError
from helpers import small_model
from instruct_format import END_OF_TEXT, TEMPLATE, encode_prompt, tokenizer
from model import GPTConfig
from test_hostile_texts import PAYLOADS, RAW
from weights import checkpoint

EVIL = [*PAYLOADS, "\x1b[H\x1b[?25l\x1b[c\x1b(0\x1b#8", "\x00nul"]
tokens_of = tokenizer().encode_ordinary


@pytest.fixture
def ask(tiny_checkpoint, monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run chat in this process with the tiny model; stdin is what a pipe would hold."""
    def run(*flags: str, stdin: str | io.TextIOBase = "", checkpoint: Path = tiny_checkpoint) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: chat.main(["--checkpoint", str(checkpoint), "--max_new_tokens", "8", *flags]))
        return Outcome(int(left.value.code or 0), *capsys.readouterr())

    return run


def check_refused(ask: Callable[..., Outcome], path: Path, code: int, message: str = "") -> None:
    """Chat says nothing but one line about this checkpoint, and nothing that a terminal obeys."""
    outcome = ask(checkpoint=path)
    assert (outcome.code, outcome.stdout, len(outcome.error_lines)) == (code, "", 1)
    assert outcome.stderr.startswith(f"error: {cli.printable_line(path)}: ") and message in outcome.stderr
    assert not RAW.search(outcome.stderr)


@pytest.fixture
def answers(monkeypatch) -> Callable[..., list[list[int]]]:
    """Make the model answer with these tokens, and Ctrl-C come before one of them. Returns the prompts, once asked."""
    def install(tokens: list[int], interrupted_at: int | None = None) -> list[list[int]]:
        prompts = []

        def fake(_, prompt: list[int], limit: int, *rest: object) -> Iterator[int]:
            prompts.append(prompt)
            for number, token in enumerate(tokens[:limit]):
                if number == interrupted_at:
                    signal.raise_signal(signal.SIGINT)
                yield token

        monkeypatch.setattr(answering.answer, "generate", fake)
        return prompts

    return install


def write_parrot(path: Path, token: int, context_length: int = 64) -> Path:
    """A model that always says this token: its embedding is the only one that the hidden state points at."""
    weights = small_model(config=GPTConfig(context_length, n_layer=2, n_head=2, n_embd=32)).state_dict()
    for name, tensor in weights.items():
        tensor.fill_(name == "transformer.ln_f.bias")
    weights["transformer.wte.weight"][token] = 1.0
    return write_checkpoint(path, context_length=context_length, model=weights)


def test_json_is_one_line_with_everything(ask, tiny_checkpoint):
    flags = ["--prompt", "Say 'é'", "--input", "x\ny", "--seed", "1", "--device", "cpu"]
    code, stdout, stderr = ask(*flags, "--json", stdin="never read\n")
    assert (code, stdout.count("\n")) == (0, 1)
    assert stderr == f"{tiny_checkpoint}: step 3, val loss 4.2500, on cpu; /help lists the commands\n"
    answer = json.loads(stdout)
    assert answer.pop("response") + "\n" == ask(*flags).stdout and answer.pop("seconds") >= 0
    assert answer == {"instruction": "Say 'é'", "input": "x\ny", "tokens": 8, "stopped": "length"}


def test_a_seed_or_temperature_0_makes_answers_reproducible(ask):
    seven, again, eight, some, others, greedy, seeded, only_one = [
        ask("--prompt", "Hi", *flags.split()).stdout for flags in (
            "--seed 7", "--seed 7", "--seed 8", "", "", "--temperature 0", "--temperature 0 --seed 1", "--top_k 1")]
    assert seven == again != eight and some != others and greedy == seeded == only_one


def test_json_says_why_an_answer_stopped(ask, answers, tmp_path):
    """The end token is not shown: first from a model that says nothing else, at temperature 0."""
    path = write_parrot(tmp_path / "end.pt", END_OF_TEXT)
    found = [ask("--prompt", "Hi", "--json", "--temperature", "0", checkpoint=path)]
    for length in (3, 8, 9):
        answers(tokens_of(" word") * length)
        found.append(ask("--prompt", "Hi", "--json"))
    assert [[json.loads(stdout)[key] for key in ("response", "tokens", "stopped")] for _, stdout, _ in found] == [
        ["", 0, "end"], [" word" * 3, 3, "end"], [" word" * 8, 8, "length"], [" word" * 8, 8, "length"]]


def conversation(ask: Callable[..., Outcome], *lines: str, flags: tuple[str, ...] = ()) -> tuple[list, Outcome]:
    """The (question, input) pairs that were answered, and the outcome."""
    outcome = ask("--json", *flags, stdin="".join(f"{line}\n" for line in lines))
    answers = [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]
    return [(answer["instruction"], answer["input"]) for answer in answers], outcome


def test_piped_questions_are_answered_a_line_each_and_unknown_commands_are_told(ask):
    asked, outcome = conversation(ask, "One?", "", "/nonsense now", "/help", "  Two?  ", "/exit", "Three?")
    assert asked == [("One?", ""), ("Two?", "")]
    assert (outcome.code, len(outcome.error_lines)) == (0, 1)  # the line that names the checkpoint
    assert "unknown command /nonsense\n" in outcome.stdout and outcome.stdout.count("/exit") == 2  # the list, twice
    assert ask(stdin="").code == 0 and ask("--json", stdin="A line without its newline").stdout.count("\n") == 1


def test_input_goes_with_the_next_question_only_in_the_prompt_of_training(ask, answers):
    prompts = answers([])
    ask("--prompt", " Do <|endoftext|> this\n", "--input", " it ")
    conversation(ask, "Zero?", "/input  some text ", "One?", "Two?", "/input gone", "/input", "Three?",
                 flags=("--input", "first"))
    assert prompts == [encode_prompt(*asked) for asked in [
        ("Do <|endoftext|> this", "it"), ("Zero?", "first"), ("One?", "some text"), ("Two?", ""), ("Three?", "")]]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of Python in a UTF-8 and in the C locale
@pytest.mark.parametrize("stdin", [b"caf\xe9?\n", "One?\n".encode("utf-16")])
def test_input_that_is_not_utf8_is_one_line_or_answered(ask, stdin, errors):
    code, stdout, stderr = ask("--json", stdin=io.TextIOWrapper(io.BytesIO(stdin), "utf-8", errors))
    assert (code, stdout == "", len(stderr.splitlines())) == ((2, True, 2) if errors == "strict" else (0, False, 1))
    assert ("error: standard input is not UTF-8" in stderr) == (code == 2)
    assert json.loads(ask("--prompt", "caf\udce9?", "--json").stdout)["tokens"] == 8


def test_characters_are_streamed_whole(answers):
    """And one that never becomes whole is shown as such at the end."""
    texts = ["🚀", "👩\u200d💻", "naïve café", "漢字", "ไทย", "mixed ☃ and plain"]
    unfinished = [*tokens_of("never "), tokens_of("🚀")[0]]
    for tokens, text in [*((tokens_of(text), text) for text in texts), (unfinished, "never \ufffd")]:
        answers(tokens)
        answer = answering.answer.Answer(small_model(), "Hi", "", Settings())
        pieces = list(answer.pieces())
        assert "".join(pieces) == text == answer.text
        assert len(pieces) == len(tokens) + 1  # as the tokens come, and the end


@pytest.mark.parametrize("payload", EVIL, ids=ascii)
def test_the_models_output_never_drives_the_terminal(ask, answers, payload):
    answers(tokens_of(f"x{payload}y"))
    for flags in ([], ["--json"]):
        code, stdout, stderr = ask("--prompt", "Hi", "--max_new_tokens", "100", *flags)
        shown = json.loads(stdout)["response"] if flags else stdout[:-1]
        assert (code, shown) == (0, cli.printable(f"x{payload}y"))
        assert not RAW.search(stdout + stderr + shown)


@pytest.mark.parametrize("payload", EVIL, ids=ascii)
def test_file_names_and_checkpoint_metadata_never_drive_the_terminal(ask, tmp_path, payload, run_state):
    path = tmp_path / f"x{payload.replace('/', '|')}\n.pt".replace("\x00", "")
    check_refused(ask, path, 2)
    path.write_bytes(b"junk")
    check_refused(ask, path, 3)
    (_, weight), *others = run_state["model"].items()
    for change in (*({part: payload} for part in ("template", "step", "format_version", "format")),
                   {"model_config": {payload: 1}}, {"model": {**dict(others), payload: weight}},
                   {"model_config": {**run_state["model_config"], "n_layer": payload}}):
        checkpoint.save(path, {**run_state, **change})
        check_refused(ask, path, 3)


@pytest.mark.parametrize("part, value, message", [
    *((part, value, f"not a usable checkpoint: {part} missing or of another type") for part, values in {
        "step": ["3", -1, ...], "val_losses": [None, [["3", "4"]], [[3, "4.2"]], 7, ...], "template": [7, ["x"], ...],
        "model": [None, [], {"a": 1}, ...], "model_config": [None, [1], ...]}.items() for value in values),
    ("format", "theirs", "not a checkpoint of this project"),
    ("template", None, "a pre-trained model; fine-tune it first"),
    ("template", "chatml/7", f"fine-tuned with template 'chatml/7', chat knows '{TEMPLATE}'"),
])
def test_a_checkpoint_that_does_not_fit_is_exit_code_3(ask, tmp_path, run_state, part, value, message):
    """A file with fitting checksums can still hold anything, or lack a part (...)."""
    state = {**run_state, part: value}
    checkpoint.save(tmp_path / "odd.pt", {name: state[name] for name in state if state[name] is not ...})
    check_refused(ask, tmp_path / "odd.pt", 3, message)


def test_a_prompt_longer_than_the_context_is_exit_code_2_or_a_line_of_a_chat_that_goes_on(ask):
    """A prompt of 63 tokens leaves room for one, a prompt of 64 for none."""
    question, long = "word" + " word" * (63 - len(encode_prompt("word"))), "word " * 100
    assert len(encode_prompt(question)) == 63
    assert json.loads(ask("--prompt", question, "--json").stdout)["tokens"] == 1
    for longer, found in [(question + " word", 64), (long, len(encode_prompt(long))), (long * 100, "far more")]:
        code, stdout, stderr = ask("--prompt", longer)
        assert (code, stdout, stderr.count("\n")) == (2, "", 2)  # the first line names the checkpoint
        assert stderr.endswith(f"\nerror: the question has {found} tokens, too many for a context of 64; shorten it\n")
    asked, outcome = conversation(ask, long, f"/input {long}", "One?", "/input", "Two?")
    assert (asked, outcome.code) == ([("Two?", "")], 0)
    assert [line.startswith("error: the question has") for line in outcome.error_lines] == [False, True, True]


def test_the_best_checkpoint_is_taken_before_the_latest(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^no checkpoint in checkpoints_instruct: fine-tune first.*demo.*$"):
        chat.main(["--prompt", "Hi"])
    chat.CHECKPOINT_DIR.mkdir()
    for name in ("latest.pt", "best_model.pt"):
        (chat.CHECKPOINT_DIR / name).symlink_to(tiny_checkpoint)
        assert chat.find_checkpoint(None).name == name


def test_a_missing_or_damaged_checkpoint_is_one_line(ask, tiny_checkpoint, tmp_path):
    path, data = tmp_path / "a.pt", tiny_checkpoint.read_bytes()
    check_refused(ask, path, 2, "a.pt: no such checkpoint\n")
    check_refused(ask, tmp_path, 2, "a folder, not a checkpoint\n")
    middle = len(data) // 2  # more damages: test_damage.py
    for damaged in (b"", data[:-1], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]):
        path.write_bytes(damaged)
        check_refused(ask, path, 3)


def test_ctrl_c_ends_an_answer_with_what_there_is_and_a_prompt_with_exit_code_130(ask, answers):
    answers(tokens_of(" word") * 8, interrupted_at=2)
    before = signal.getsignal(signal.SIGINT)
    code, stdout, _ = ask("--prompt", "Hi", "--json")
    answer = json.loads(stdout)
    assert (code, answer["tokens"], answer["response"], answer["stopped"]) == (130, 3, " word" * 3, "interrupt")
    assert signal.getsignal(signal.SIGINT) is before
    asked, outcome = conversation(ask, "One?", "Two?")
    assert (len(asked), outcome.stdout.count('"stopped": "interrupt"'), outcome.code) == (2, 2, 0)


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path):
    """In a pseudo-terminal, as a user at a keyboard has it. An answer is 16,000 tokens long: that takes seconds, so a
    key always comes in the middle of one."""
    path = write_parrot(tmp_path / "endless.pt", tokens_of(" word")[0], context_length=16384)
    screen, terminal = os.openpty()
    subprocess.run(["stty", "-echo"], stdin=terminal, check=True)  # what comes back is what the program wrote
    process = subprocess.Popen(
        [sys.executable, SRC / "chat.py", "--checkpoint", path, "--temperature", "0", "--max_new_tokens", "16000"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))  # makes it the controlling terminal
    os.close(terminal)

    def type_keys(keys: str, until: str) -> str:
        """Type, then read until a pattern shows."""
        os.write(screen, keys.encode())
        text = ""
        while not re.search(until, text):
            assert select.select([screen], [], [], TIMEOUT)[0], f"{until!r} did not show up after {text[-300:]!r}"
            text += os.read(screen, 65536).decode(errors="replace")
        return text

    with process, open(screen, "rb", buffering=0):  # closed when a check fails, the terminal ends the chat
        type_keys("", r"/help lists the commands\r\n> ")
        for question in ("One?", "Two?"):
            type_keys(f"{question}\n", "word")  # the answer has begun
            assert type_keys("\x03", r"\r\n> $").count("word") < 15_000
        time.sleep(1)  # Python's readline misses a signal between showing the prompt and waiting for keys
        type_keys("\x03", r"\r\n> $")  # outside an answer it gives a new line
        type_keys("/help\n", r"Ctrl-C stops an answer\r\n> $")
        type_keys("\x04", r"\r\n$")
        assert process.wait(TIMEOUT) == 0
