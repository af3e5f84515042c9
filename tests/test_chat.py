"""Chat: one answer or a conversation, text that streams in whole characters and never drives the terminal, Ctrl-C."""

import io
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import answering.answer
import answering.batch
import chat
import cli
from answering.answer import Answer
from answering.opened import open_for_answers
from answering.settings import Settings
from answering.terminal import Chat, first_line
from conftest import SRC, Outcome, launch, run_command
from errors import UserError
from instruct_format import END_OF_TEXT, TEMPLATE, encode_example, encode_prompt, tokenizer
from keyboard import write_parrot
from model import GPTConfig
from models import CPU, small_model, write_checkpoint
from test_hostile_files import PAYLOADS, RAW
from weights import checkpoint

EVIL = [*PAYLOADS, "\x1b[H\x1b[?25l\x1b[c\x1b(0\x1b#8", "\x00nul"]
tokens_of = tokenizer().encode_ordinary


@pytest.fixture
def ask(tiny_checkpoint, monkeypatch, run_main) -> Callable[..., Outcome]:
    """Run chat in this process with the tiny model; stdin is what a pipe would hold."""
    def run(*flags: str, stdin: str | bytes = "", checkpoint: Path = tiny_checkpoint) -> Outcome:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run_main(chat.main, "--checkpoint", checkpoint, "--max_new_tokens", 8, *flags)

    return run


def check_refused(ask: Callable[..., Outcome], path: Path, code: int, message: str = "") -> None:
    """Chat says nothing but one line about this checkpoint, and nothing that a terminal obeys."""
    said = ask(checkpoint=path).refusal(code)
    assert said.startswith(f"error: {cli.printable_line(path)}: ") and message in said and not RAW.search(said)


@pytest.fixture
def answers(monkeypatch) -> Callable[..., list[list[int]]]:
    """Make the model answer with these tokens, the last ones again and again, and Ctrl-C come before one of them.
    Returns the prompts, once asked."""
    def install(*replies: list[int], interrupted_at: int | None = None) -> list[list[int]]:
        prompts = []

        def fake(_, prompt: list[int], limit: int, *rest: Any) -> Iterator[int]:
            tokens = replies[min(len(prompts), len(replies) - 1)]
            prompts.append(prompt)
            for number, token in enumerate(tokens[:limit]):
                if number == interrupted_at:
                    signal.raise_signal(signal.SIGINT)
                yield token
                if rest[-1]():  # is_stopped
                    return

        monkeypatch.setattr(answering.answer, "generate", fake)
        return prompts

    return install


def test_json_is_one_line_with_everything(ask, tiny_checkpoint):
    flags = ["--prompt", "Say 'é'", "--input", "x\ny", "--seed", "1", "--device", "cpu"]
    code, stdout, stderr = ask(*flags, "--json", stdin="never read\n")
    assert (code, stdout.count("\n")) == (0, 1)
    assert stderr == "tiny.pt, 1.6M, val loss 4.2500, cpu: each question stands alone\n"
    answer = json.loads(stdout)
    assert cli.printable(answer.pop("response")) + "\n" == ask(*flags).stdout
    assert answer.pop("seconds") >= 0 and answer.pop("tokens_per_second") > 0
    assert answer == {"instruction": "Say 'é'", "input": "x\ny", "tokens": 8, "stopped": "length", "seed": 1,
                      "prompt_tokens": len(encode_prompt("Say 'é'", "x\ny")), "checkpoint": str(tiny_checkpoint),
                      "settings": {"max_new_tokens": 8, "temperature": 0.7, "top_k": 50, "top_p": 0.95,
                                   "repetition_penalty": 1.0}}


def test_json_says_why_an_answer_stopped(ask, answers, tmp_path):
    """The end token is not shown: first from a model that says nothing else, at temperature 0."""
    path = write_parrot(tmp_path / "end.pt", END_OF_TEXT)
    found = [ask("--prompt", "Hi", "--json", "--temperature", "0", checkpoint=path)]
    for length in (3, 8, 9):
        answers(tokens_of(" word") * length)
        found.append(ask("--prompt", "Hi", "--json"))
    assert [[json.loads(stdout)[key] for key in ("response", "tokens", "stopped")] for _, stdout, _ in found] == [
        ["", 0, "end"], [" word" * 3, 3, "end"], [" word" * 8, 8, "length"], [" word" * 8, 8, "length"]]
    notes = [ask("--prompt", "Hi", "--max_new_tokens", number).stderr.splitlines()[1:] for number in ("8", "10")]
    found = json.loads(ask("--prompt", "word" + " word" * 50, "--json").stdout)
    assert notes == [["(cut at 8 tokens: --max_new_tokens)"], []] and found["stopped"] == "context"
    assert found["prompt_tokens"] + found["tokens"] == 64


def conversation(ask: Callable[..., Outcome], *lines: str, flags: tuple[str, ...] = ()) -> tuple[list, Outcome]:
    """The (question, input) pairs that were answered, and the outcome."""
    outcome = ask("--json", *flags, stdin="".join(f"{line}\n" for line in lines))
    answers = [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]
    return [(answer["instruction"], answer["input"]) for answer in answers], outcome


def test_piped_questions_are_answered_a_line_each_and_commands_are_questions(ask):
    asked, outcome = conversation(ask, "One?", "", "/etc/passwd holds what?", "/help", "  Two?  ", "exit", "Three?")
    assert [question for question, _ in asked] == ["One?", "/etc/passwd holds what?", "/help", "Two?", "exit", "Three?"]
    assert (outcome.code, len(outcome.stderr.splitlines())) == (0, 1)  # the line that names the checkpoint
    assert ask(stdin="").code == 0 and ask("--json", stdin="A line without its newline").stdout.count("\n") == 1


def test_input_goes_with_one_question_only_in_the_prompt_of_training(ask, answers):
    prompts = answers([])
    ask("--prompt", " Do <|endoftext|> this\n", "--input", " it ", stdin="not read")
    ask("--prompt", "Sum up", stdin="\ufeffa\nfile\n")
    conversation(ask, "Zero?", "One?", flags=("--input", "first"))
    assert prompts == [encode_prompt(*asked) for asked in [
        (" Do <|endoftext|> this", " it"), ("Sum up", "a\nfile"), ("Zero?", "first"), ("One?", "")]]
    objects = '{"instruction": "Two?", "input": "a\\nb"}\n{"input": null, "instruction": "Three?", "x": 1}'
    many = ask("--jsonl", stdin=objects)
    assert [json.loads(line)["prompt_tokens"] for line in many.stdout.splitlines()] == [
        len(encode_prompt("Two?", "a\nb")), len(encode_prompt("Three?"))]
    for flags in (("--prompt", "a", "--jsonl"), ("--input", "a", "--jsonl"), ("--prompt", " "), ("--prompt", "")):
        ask(*flags).refusal()  # before the model is loaded
    assert ask("--input", "a", stdin="\n").stderr.splitlines()[1:] == ["error: no question for the --input"]


BAD = {b"caf\xe9?": "not UTF-8: byte 0xe9 in column", b"a\0b": "a NUL character", b"word " * 900: "too many for a con"}
BAD_OBJECTS = {
    b'{"instruction": "caf\xe9"}': "not UTF-8: byte 0xe9 in column", b'{"instruction": "a"': "cannot be read as JSON: ",
    b'["a"]': "expected an object with an instruction", b"{}": "expected an ob", b'{"input": "a"}': "expected an ob",
    b'{"instruction": 7}': "'instruction' must be text", b'{"instruction": null}': "'instruction' must be text",
    b'{"instruction": "a", "input": 0}': "'input' must be text", b'{"instruction": " "}': "the question is empty",
    b'{"instruction": "a", "input": "' + b"word " * 90 + b'"}': "too many for a context of 64; shorten the input",
    b"[" * 100_000: "nested too deeply", b"7" * 5000: "expected an ob"}


@pytest.mark.parametrize("flag, good, bad", [("--json", b"One?", BAD),
                                             ("--jsonl", b'{"instruction": "One?"}', BAD_OBJECTS)])
def test_a_line_that_cannot_be_answered_costs_no_other(ask, flag, good, bad):
    """50 lines, the bad ones spread over them: each has its line of output, which names it."""
    lines = [good] * 50
    lines[2:2 + 3 * len(bad):3] = bad
    code, stdout, stderr = ask(flag, "--max_new_tokens", "1", stdin=b"\xef\xbb\xbf" + b"\r\n".join(lines))
    found = [json.loads(line) for line in stdout.splitlines()]
    assert (code, len(found)) == (2, 50) and f"error: {len(bad)} of 50 questions were not answered" in stderr
    for number, (line, answer) in enumerate(zip(lines, found), 1):
        assert line == good or (answer["error"].startswith(f"line {number}: ") and bad[line] in answer["error"])
        assert (answer["instruction"] == "One?") == ("error" not in answer) == (line == good)
    text = ask("--max_new_tokens", "1", stdin=b"One?\ncaf\xe9\nTwo?\n")
    assert (text.code, text.stderr.count("error: line 2: not UTF-8: byte 0xe9 in column 4\n")) == (2, 1)
    assert ask("--prompt", "One?", stdin=b"caf\xe9").stderr.splitlines()[1:] == [
        "error: standard input: not UTF-8: byte 0xe9 in column 4"]
    utf16 = ask(stdin="One?\nTwo?\n".encode("utf-16"))
    assert (utf16.code, utf16.stdout, utf16.stderr.count("error: line")) == (2, "", 3)
    assert ask("--prompt", "caf\udce9?").refusal() == "error: --prompt: not UTF-8: byte 0xe9 in column 4\n"


def test_an_answer_depends_on_its_own_seed_alone(ask):
    flags = ("--json", "--seed", "5")

    def responses(*flags: str, stdin: str = "") -> list[str]:
        return [json.loads(line)["response"] for line in ask(*flags, stdin=stdin).stdout.splitlines()]

    questions = ["One?", "Two?", "One?"] * 6  # more than one batch
    objects = "\n".join(json.dumps({"instruction": question}) for question in questions)
    one, two, again, *_ = found = responses(*flags, stdin="\n".join(questions))
    assert one == again and [two] == responses("--prompt", "Two?", *flags)
    assert responses("--jsonl", *flags[1:], stdin=objects) == found
    exact = ("--quantize", "int8", "--device", "cpu", *flags)
    quantized = responses(*exact, "--jsonl", stdin=objects)
    assert len(quantized) == len(found) == 18 and responses(*exact, stdin="\n".join(questions)) == quantized
    drawn = json.loads(ask("--prompt", "Two?", "--json").stdout)
    assert responses("--prompt", "Two?", "--json", "--seed", str(drawn["seed"])) == [drawn["response"]]
    plain = [ask("--prompt", "Hi", *flags.split()).stdout for flags in (
        "--seed 7", "--seed 8", "", "", "--temperature 0", "--temperature 0 --seed 1", "--top_k 1")]
    assert len(set(plain)) == 5 and len(set(plain[4:])) == 1  # the last three are greedy


def spoken(answers: Callable[..., Any], tokens: list[int]) -> tuple[list[str], str]:
    """The pieces of an answer of these tokens, and why it ended."""
    answers(tokens)
    answer = Answer(small_model(), "Hi", "", Settings())
    pieces = list(answer.pieces())
    assert "".join(pieces) == answer.text
    return pieces, answer.stopped


def test_characters_are_streamed_whole(answers):
    """As the tokens come, and the end: together they are what decoding the whole gives. A character that never becomes
    whole is shown as such at the end."""
    texts, chance = ["🚀", "👩\u200d💻", "naïve café", "漢字", "ไทย", "mixed ☃ and plain"], random.Random(0)
    unfinished = [*tokens_of("never "), tokens_of("🚀")[0]]
    at_random = ([chance.randrange(END_OF_TEXT) for _ in range(chance.randrange(30))] for _ in range(500))
    for tokens in (*map(tokens_of, texts), unfinished, *at_random):
        (pieces, _), text = spoken(answers, tokens), tokenizer().decode(tokens)
        assert ("".join(pieces) == text and len(pieces) == len(tokens) + 1) or "\n### " in text
    assert "".join(spoken(answers, unfinished)[0]) == "never \ufffd"


@pytest.mark.parametrize("before, header, rest", [
    ("Yes.\n\n", "### Instruction:", "\nMore?\n\n### Response:\nNo."), ("Yes.\n", "### Input:", "\nx"),
    ("", "### Response:", "\nx"),
    ("a\n#\n##\n### Instructions\n### In\n\n\n", "### Instruction:", " x")])
def test_a_header_of_the_template_ends_the_answer_and_never_shows(answers, before, header, rest):
    pieces, stopped = spoken(answers, tokens_of(before + header + rest))
    assert ("".join(pieces), stopped) == (before.rstrip("\n"), "end")
    for kept in ("a ### Instruction: b", "### Instruct", "a\n\n", "a\n\n#", "\n\n### Inputs"):
        assert "".join(spoken(answers, tokens_of(kept))[0]) == kept


@pytest.mark.parametrize("payload", EVIL, ids=ascii)
def test_the_models_output_never_drives_the_terminal(ask, answers, payload):
    answers(tokens_of(f"x{payload}y"))
    for flags in ([], ["--json"]):
        code, stdout, stderr = ask("--prompt", "Hi", "--max_new_tokens", "100", *flags)
        shown = json.loads(stdout)["response"] if flags else stdout[:-1]
        assert (code, shown) == (0, f"x{payload}y" if flags else cli.printable(f"x{payload}y"))
        assert not RAW.search(stdout + stderr)


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
    *((part, value, "its vocabulary has 64 tokens, GPT-2's has 50,257") for part, value in (
        ("format", "theirs"), ("step", 1))),
    ("template", "chatml/7", f"fine-tuned with template 'chatml/7', this version knows '{TEMPLATE}'"),
])
def test_a_checkpoint_that_does_not_fit_is_exit_code_3(ask, tmp_path, run_state, part, value, message):
    """A file with fitting checksums can still hold anything, or lack a part (...)."""
    state = {**run_state, part: value}
    checkpoint.save(tmp_path / "odd.pt", {name: state[name] for name in state if state[name] is not ...})
    check_refused(ask, tmp_path / "odd.pt", 3, message)


def test_a_prompt_longer_than_the_context_is_exit_code_2_and_what_makes_it_so_is_named(ask):
    """A prompt of 63 tokens leaves room for one, a prompt of 64 for none."""
    question, long = "word" + " word" * (63 - len(encode_prompt("word"))), "word " * 100
    assert len(encode_prompt(question)) == 63
    assert json.loads(ask("--prompt", question, "--json").stdout)["tokens"] == 1
    for longer, found in [(question + " word", 64), (long, len(encode_prompt(long))), (long * 100, "far more")]:
        code, stdout, stderr = ask("--prompt", longer)
        assert (code, stdout, stderr.count("\n")) == (2, "", 2)  # the first line names the checkpoint
        assert stderr.endswith(f"\nerror: the question has {found} tokens, too many for a context of 64; shorten it\n")
    found = len(encode_prompt("One?", long))
    assert ask("--prompt", "One?", "--input", long).stderr.endswith(
        f"\nerror: the question with its input has {found} tokens, too many for a context of 64; shorten the input\n")


def test_the_best_checkpoint_is_taken_before_the_latest(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "PROJECT", tmp_path)
    with pytest.raises(UserError, match=r"^no checkpoint in checkpoints_instruct: fine-tune first.*demo.*$"):
        chat.main(["--prompt", "Hi"])
    chat.CHECKPOINT_DIR.mkdir()
    for name in ("latest.pt", "best_model.pt"):
        (chat.CHECKPOINT_DIR / name).symlink_to(tiny_checkpoint)
        assert chat.find_checkpoint(None).name == name


def test_ctrl_c_ends_an_answer_with_what_there_is_and_a_batch_with_exit_code_130(ask, answers):
    answers(tokens_of(" word") * 8, interrupted_at=2)
    before = signal.getsignal(signal.SIGINT)
    outcome = ask("--prompt", "Hi")
    assert outcome[:2] == (130, " word" * 3 + "\n") and outcome.stderr.splitlines()[1:] == ["(stopped)"]
    assert signal.getsignal(signal.SIGINT) is before
    asked, outcome = conversation(ask, "One?", "Two?")  # the first is interrupted, and that ends the batch
    assert (len(asked), outcome.stdout.count('"stopped": "interrupt"'), outcome.code) == (1, 1, 130)


@pytest.mark.parametrize("n_tokens, n_whole", [(1, 0), (8 * 16, 16), (8 * 16 + 1, 16), (8 * 20, 20)])
def test_ctrl_c_ends_a_batch_with_the_answers_that_are_whole(ask, tmp_path, monkeypatch, n_tokens, n_whole):
    """At the first or the last token of sixteen questions, or of those after them."""
    path, choose, chosen = write_parrot(tmp_path / "parrot.pt", tokens_of(" word")[0]), answering.batch.choose, []

    def interrupted(*arguments: Any) -> int:
        chosen.append(1)
        if len(chosen) == n_tokens:
            signal.raise_signal(signal.SIGINT)
        return choose(*arguments)

    monkeypatch.setattr(answering.batch, "choose", interrupted)
    found = ask("--jsonl", stdin='{"instruction": "Hi"}\n' * 20, checkpoint=path)
    whole = [line for line in found.stdout.splitlines() if json.loads(line)["stopped"] == "length"]
    assert (found.code, len(whole), len(chosen)) == (130, n_whole, n_tokens)


def converse(monkeypatch: pytest.MonkeyPatch, lines: str, interrupted_at: str | None = None) -> None:
    """A conversation in this process, of lines that are typed. Ctrl-C comes as this prompt shows, before the next line
    is waited for."""
    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if text == interrupted_at:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stderr", Screen())
    model = small_model(config=GPTConfig(256, 50257, 1, 2, 32))
    assert Chat(model, "a.pt", Settings(), remembers=True, as_json=False).converse("", keep_history=False) == 0


def test_ctrl_c_between_two_lines_of_a_message_discards_it(answers, monkeypatch):
    prompts = answers(tokens_of("Yes"))
    converse(monkeypatch, '"""\nTwo?\n', "... ")
    assert prompts == [encode_prompt("Two?")]


def test_regen_answers_the_last_question_after_the_turns_before_it(answers, monkeypatch):
    """Also when that was not kept, because its answer was empty, and the question before it was the same."""
    prompts = answers(*map(tokens_of, ("Yes", "", "No", "Well")))
    converse(monkeypatch, "One?\nOne?\n/regen\n/regen\n")
    first, second, again, more = prompts
    assert second == again == more == encode_example("One?", "", "Yes")[0] + first


def test_a_pretrained_model_answers_and_is_named_as_such(ask, tmp_path, run_state):
    weights = small_model(config=GPTConfig(64, 50257, 1, 2, 32)).state_dict()
    torch.save({"model": weights, "config": {"n_head": 2}}, tmp_path / "bare.pt")
    write_checkpoint(tmp_path / "ours.pt", template=None)
    write_checkpoint(tmp_path / "multi.pt", multi_turn=True)
    for name, said in [("bare.pt", "pre-trained, not fine-tuned"), ("ours.pt", "pre-trained, not fine-tuned"),
                       ("multi.pt", "each question stands alone")]:
        code, stdout, stderr = ask("--prompt", "Hi", "--json", checkpoint=tmp_path / name)
        assert (code, json.loads(stdout)["tokens"]) == (0, 8)
        assert stderr.endswith(f"cpu: {said}\n") and len(stderr) <= 81
    said = first_line(Path("a"), checkpoint.load(tmp_path / "multi.pt"), "cpu", "; /help")  # of a conversation
    assert said.endswith("cpu: remembers the turns before; /help")


def test_the_checkpoint_may_be_overwritten_while_its_model_is_in_use(tmp_path, tiny_checkpoint):
    """In place, so that a mapped file would end the program with SIGBUS."""
    path = Path(shutil.copy(tiny_checkpoint, tmp_path))
    model, _ = open_for_answers(path, CPU)
    path.write_bytes(b"")
    assert len(list(Answer(model, "word " * 20, "", Settings(max_new_tokens=3)).pieces())) == 4


@pytest.mark.parametrize("shell, code, shown", [
    (">&-", 0, ""), (">/dev/full", 2, "error: standard output: No space left on device"), ("2>/dev/full", 0, ""),
    ("2>&-", 0, ""), ("<&-", 0, "(cut at"), ("| true", 0, ""), ("2>&1 >/dev/null | true", 0, "")])
def test_streams_that_are_closed_or_full(shell, code, shown, tiny_checkpoint):
    command = f"{sys.executable} {SRC}/chat.py --checkpoint {tiny_checkpoint} --max_new_tokens 8 --prompt Hi {shell}"
    found = run_command("bash", "-o", "pipefail", "-c", command)
    assert found.code == code and shown in found.stderr and "Traceback" not in found.stderr


def test_the_launcher_finds_files_where_the_user_stands(tmp_path, project, tiny_checkpoint):
    (tmp_path / "latest.pt").symlink_to(tiny_checkpoint)
    (tmp_path / "chat").symlink_to(project / "chat.sh")
    for folder, script, *arguments in ((project, "chat.sh", "latest.pt"), (tmp_path, "chat", tiny_checkpoint),
                                       (project, "chat.sh", "--checkpoint", "latest.pt")):
        found = launch(folder, script, *arguments, "--prompt", "Hi", "--max_new_tokens", 1, cwd=tmp_path)
        assert found.code == 0, found.stderr
    for name, message in (("absent.pt", "absent.pt: no such checkpoint; a question goes after --prompt"),
                          ("demo", "no demo yet; run ./start_instruct_training.sh demo first")):
        assert launch(project, "chat.sh", name, cwd=tmp_path).refusal() == f"error: {message}\n"
