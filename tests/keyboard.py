"""Chat at a real pseudo-terminal: tables of situations, what is typed and what has to show.

    python tests/keyboard.py FOLDER          FOLDER gets small models

PyTorch is imported once and every chat is a fork, because that takes longer than all else. Prints each situation as it
begins, and ends with an error at the first that is not as it should be.
"""

import fcntl
import json
import locale
import os
import pty
import random
import re
import resource
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conftest import SRC, TIMEOUT
from instruct_format import tokenizer
from model import GPTConfig
from models import small_model, write_checkpoint

FOLDER = Path(sys.argv[-1])
PROMPT = r"> $"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
begin = partial(print, flush=True)  # a situation, before the fork: it would print what waits as well


def write_parrot(path: Path, token: int, context_length: int = 64, **changes: object) -> Path:
    """A model that always says this token: its embedding is the only one that the hidden state points at."""
    model = small_model(config=GPTConfig(context_length, n_layer=2, n_head=2, n_embd=32))
    for name, tensor in model.state_dict().items():
        tensor.fill_(name == "transformer.ln_f.bias")
    model.state_dict()["transformer.wte.weight"][token] = 1.0
    return write_checkpoint(path, model, **changes)


class Session:
    """A chat in a terminal of its own. before runs in its process, to change the streams."""

    def __init__(self, *flags: str, before: Callable[[], object] = lambda: None, columns: int = 80,
                 environment: dict[str, str] | None = None) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            self._be_chat(flags, before, {"HOME": str(FOLDER), "TERM": "xterm", **(environment or {})})
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.raw = ""

    def _be_chat(self, flags: tuple[str, ...], before: Callable[[], object], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        os.chdir(FOLDER)
        before()
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        streams = []
        for number, mode in enumerate("rww"):
            try:
                streams.append(open(number, mode, encoding=encoding, closefd=False))  # noqa: SIM115
            except OSError:
                streams.append(None)  # as Python has it when the stream is closed
        sys.stdin, sys.stdout, sys.stderr = streams  # type: ignore[assignment]
        import chat
        import cli

        cli.run(lambda: chat.main(list(flags)), os._exit)

    def _more(self) -> str:
        """What shows next; nothing once the chat has left."""
        assert select.select([self.screen], [], [], TIMEOUT / 4)[0], f"nothing more after {self.raw[-400:]!r}"
        try:
            return os.read(self.screen, 65536).decode(errors="replace")
        except OSError:
            return ""

    def see(self, until: str = PROMPT) -> str:
        """What shows up to a pattern, without the sequences that draw it."""
        self.raw = ""
        while not re.search(until, ESCAPES.sub("", self.raw)):
            self.raw += (more := self._more())
            assert more, f"left before {until!r}, after {self.raw[-400:]!r}"
        return ESCAPES.sub("", self.raw)

    def type(self, keys: str, until: str = PROMPT) -> str:
        for begin in range(0, len(keys), 512):  # a terminal takes some thousand characters at a time
            os.write(self.screen, keys[begin:begin + 512].encode("utf-8", "surrogateescape"))
            if len(keys) > 512:
                time.sleep(0.01)
        return self.see(until)

    def do(self, keys: str | list[str]) -> str:
        """Type keys, or parts of them, each after what came before has shown."""
        *parts, last = keys if isinstance(keys, list) else [keys]
        for part in parts:
            self.type(part, r" word word|\.\.\. " if part.endswith("\r") else re.escape(part.rpartition("\r")[2]) + "$")
        return self.type(last)

    def end(self, code: int) -> None:
        """Everything has been typed: the chat leaves by itself, with this exit code."""
        self.raw = ""
        while more := self._more():
            self.raw += more
        os.close(self.screen)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == code and "Traceback" not in self.raw, self.raw


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


LINES = "\n".join(f"line {number}" for number in range(400))
# What is typed: a list is typed in parts, each after the one before has shown.
# What has to show: a pattern, or fields of the JSON line.
Table = list[tuple[str, "str | list[str]", "str | dict[str, object]"]]
ASKING: Table = [  # one chat with --json, in order
    ("a line", "One?\r", {"instruction": "One?", "input": "", "stopped": "length", "checkpoint": "parrot.pt"}),
    ("blanks around a line", "  Two? \r", {"instruction": "Two?"}),
    ("nothing", "\r", r"^\s*> $"),
    ("characters of every kind", "\u00e9 \U0001f680 \u6f22?\r", {"instruction": "\u00e9 \U0001f680 \u6f22?"}),
    ("bytes that are no UTF-8", "caf\udce9?\r", {"stopped": "length"}),
    ("a line that is taken back", "abc\x15Real?\r", {"instruction": "Real?"}),
    ("a paste of four lines", paste("a\nb\nc\nd") + "\r", {"instruction": "a\nb\nc\nd"}),
    ("a paste of 400 lines", paste(LINES) + "\r", {"instruction": LINES}),
    ("a paste with an end of line", paste("a\nb\n") + "\r", {"instruction": "a\nb\n"}),
    ("a paste with tabs and indentation", paste("\tif a:\n\t\tb") + "\r", {"instruction": "\tif a:\n\t\tb"}),
    ("a paste as terminals send it", paste("a\rb") + "\r", {"instruction": "a\nb"}),
    ("a paste of escape sequences", paste("a\x1b[2J\x1b]0;x\x07b") + "\r", {"instruction": "a\x1b[2J\x1b]0;x\x07b"}),
    ("a paste that begins like a command", paste("/* c */\nint f();") + "\r", {"instruction": "/* c */\nint f();"}),
    ("a paste with slashes in front", paste("// c\nint f();") + "\r", {"instruction": "// c\nint f();"}),
    ("such lines between quotes", '"""// c\rint f();"""\r', {"instruction": "// c\nint f();"}),
    ("and with the name of a command", '"""/input x\ry"""\r', {"instruction": "/input x\ny"}),
    ("a paste that begins with quotes", paste('"""Sums."""\ndef f():\n\t"""Adds."""') + "\r", {
        "instruction": '"""Sums."""\ndef f():\n\t"""Adds."""'}),
    ("two pastes and typing", f"{paste('a')} b {paste('c')}\r", {"instruction": "a b c"}),
    ("the last message again", "\x1b[A\r", {"instruction": "a b c"}),
    ("a message of several lines again", "\x1b[A" * 10 + "\r", {"instruction": "\tif a:\n\t\tb"}),
    ("lines between quotes", '"""\rfirst\r\r  third\r"""\r', {"instruction": "first\n\n  third"}),
    ("text beside the quotes", '"""first\rlast"""\r', {"instruction": "first\nlast"}),
    ("quotes on one line", '"""one line"""\r', {"instruction": "one line"}),
    ("empty quotes", '""""""\r', r"\"\"\"\s*> $"),
    ("a command between quotes", '"""\r/help\r"""\r', {"instruction": "/help"}),
    ("quotes in a line", 'say """a""" now\r', {"instruction": 'say """a""" now'}),
    ("quotes again, as one message", "\x1b[A" * 3 + "\r", {"instruction": "one line"}),
    ("a slash in front", "//etc/passwd holds what?\r", {"instruction": "/etc/passwd holds what?"}),
    ("Ctrl-C between quotes", ['"""\rabc\r', "\x03"], r"> $"),
    ("a line that Ctrl-C discards", ["abc", "\x03"], r"^(?!.*leaves)"),
    ("Ctrl-C at an empty prompt", "\x03", r"Ctrl-C again leaves, and so do Ctrl-D and /exit"),
    ("a question after that", "Three?\r", {"instruction": "Three?"}),
    ("Ctrl-C after a question", "\x03", r"Ctrl-C again leaves"),
    ("Ctrl-C, then one that discards", ["abc", "\x03"], r"^(?!.*again)"),
    ("/help", "/help\r", r"/input +TEXT(.|\n)*/regen(.|\n)*/exit"),
    ("a command that tab completes", "/he\t\r", r"/input +TEXT"),
    ("a setting that tab completes", "/set tempe\t1.5\r", r"temperature +1.5 "),
    ("tab in a question", "a\tb\r", {"instruction": "ab"}),
    ("a command with a slip", "/hlep\r", r"error: no command /hlep, did you mean /help\?; /help lists them"),
    ("no command at all", "/etc/passwd holds what?\r", r"error: no command /etc/passwd; /help lists them, // begins"),
    ("a command like a sequence", "/\x16\x1b[2J\r", r"error: no command /\\x1b\[2J"),
    ("/set", "/set\r", r"max_new_tokens +2 (.|\n)*temperature +1.5 (.|\n)*seed +none (.|\n)*last answer: 2 tokens in "
                       r"\d+\.\d\d s, the first after \d+\.\d\d s, \d+\.\d tokens/s; context\s+\d+ of 4096; seed \d+"),
    ("/set with a name", "/set top_p\r", r"top_p +0.95 .*above 0, at most 1"),
    ("a temperature below 0", "/set temperature -1\r", r"temperature stays 1.5: '-1' is not possible \(.*at least 0"),
    ("a top_p of 0", "/set top_p 0\r", r"top_p stays 0.95: '0' is not .*above 0, at most 1"),
    ("a penalty below 1", "/set repetition_penalty .5\r", r"y stays 1.0: '.5' is not .*1 \(off\) to 10"),
    ("a seed below 0", "/set seed -1\r", r"seed stays none: '-1' is not .*none"),
    ("an unknown setting", "/set temprature 1\r", "no setting temprature; there are .*temperature, "),
    ("a seed", "/set seed 7\r", r"seed +7 "),
    ("an answer with a seed", "One?\r", {"seed": 7}),
    ("no seed", "/set seed none\r", r"seed +none "),
    ("top_k", "/set top_k 1\r", r"top_k +1 "),
    ("settings in an answer", "One?\r", {"settings": {
        "max_new_tokens": 2, "temperature": 1.5, "top_k": 1, "top_p": 0.95, "repetition_penalty": 1.0}}),
    ("/input", "/input some text\r", r"\(input: 1 line\) > $"),
    ("a command while input waits", "/set top_k 2\r", r"\(input: 1 line\) > $"),
    ("a question with input", "One?\r", {"instruction": "One?", "input": "some text"}),
    ("the next one", "One?\r", {"input": ""}),
    ("/input with an indented line", "/input     def f():\r", r"\(input: 1 line\) > $"),
    ("the question for those lines", "One?\r", {"input": "    def f():"}),
    ("/input to be removed", "/input gone\r", r"\(input: 1 line\) > $"),
    ("/input removed", "/input\r", r"^/input\s+> $"),
    ("/input pasted", f"/input {paste(LINES)}\r", r"\(input: 400 lines\) > $"),
    ("the question for that paste", "One?\r", {"input": LINES}),
    ("/regen with input", "/regen\r", {"instruction": "One?", "input": LINES}),
    ("/input between quotes", '/input """\ra\r\r/b\r"""\r', r"\(input: 3 lines\) > $"),
    ("the question for that", "One?\r", {"input": "a\n\n/b"}),
    ("/input of a file", "/input @file.txt\r", r"\(input: 2 lines\) > $"),
    ("the question for it", "One?\r", {"input": "in a\nfile"}),
    ("a file that is not there", "/input @absent.txt\r", r"error: absent.txt: no such file"),
    ("a folder", "/input @.\r", r"error: \.: a folder, not a file"),
    ("a device", "/input @/dev/zero\r", r"error: /dev/zero: a pipe or a device, not a file"),
    ("a file that is no text", "/input @parrot.pt\r", r"error: parrot.pt: not UTF-8: byte 0x\w\w in column \d+"),
    ("a question that is too long", paste("word " * 5000) + "\r", r"error: the question has 5\d+ tokens, "
     "too many for a context of 4096; shorten it"),
    ("input that is too long", "/input @long.txt\r", r"\(input: 1 line\) > $"),
    ("and named", "One?\r", r"error: the question with its input has 5,?\d+ tokens, too many for a context of 4096; "
                            r"shorten the input(.|\n)*line\) > $"),
    ("no input after all", "/input\r", r"^/input\s+> $"),
    ("/save without a name", "/save\r", r"error: /save needs the name of a file"),
    ("/save in a folder that is not there", "/save absent/a.jsonl\r", r"error: absent/a.jsonl: No such file"),
    ("/save over a file", "/save file.txt\r", r"error: file.txt: File exists; choose another name"),
    ("/save to a folder", "/save .\r", r"error: \.: (File exists|Is a directory); choose another name"),
    ("/save", "/save saved.jsonl\r", r"saved (\d+) of \1 turns to saved.jsonl"),
    ("/clear", "/clear\r", "forgotten"),
    ("/regen without a question", "/regen\r", "error: there is no question yet"),
    ("/save without a turn", "/save none.jsonl\r", "error: there is nothing to save yet"),
]


def check(found: str, expected: str | dict[str, object]) -> None:
    if isinstance(expected, str):
        assert re.search(expected, found.replace("\r\n  ", " ")), found
    else:
        [*_, line] = [line.strip() for line in found.splitlines() if line.startswith('{"instruction"')]
        assert json.loads(line).items() >= expected.items(), found


ENDLESS = ("--checkpoint", "parrot.pt", "--max_new_tokens", "4000", "--temperature", "0")
SHORT = (*ENDLESS, "--max_new_tokens", "3")
ANSWER = ("an answer", "One?\r", r"One\?\s+ word word word\s+\(cut at 3 tokens: /set max_new_tokens\)\s+> $")


def woken_all_the_time() -> None:
    """So often that a Ctrl-C falls together with the timer's signal."""
    real = signal.setitimer
    signal.setitimer = lambda which, *seconds: real(which, *(each and 2e-4 for each in seconds))  # type: ignore


STOPPED: Table = [
    ("Ctrl-C in an answer", ["One?\r", "\x03"], r"\(stopped\)\s+> $"),
    ("and in the next", ["Two?\r", "\x03"], r"\(stopped\)\s+> $"),
    ("/set after a stop", "/set\r", r"last answer: \d+ tokens"),
    ("/save of half answers", "/save half.jsonl\r", "error: there is nothing to save yet"),
    ("a limit", "/set max_new_tokens 3\r", "tokens +3 "),
    ("/regen of the second", "/regen\r", r"word word word\s+\(cut at 3"),
    ("another limit", "/set max_new_tokens 2\r", "tokens +2 "),
    ("/regen after a cut answer", "/regen\r", r"word word\s+\(cut at 2"),
    ("/save of the last version", "/save half.jsonl\r", r"saved 1 of 2 turns to .*half.jsonl\s"),
]
MULTI: Table = [
    ("the first turn", "One?\r", {"prompt_tokens": 12}),
    ("the second", "Two?\r", {"prompt_tokens": 27}),
    ("/regen of the second", "/regen\r", {"instruction": "Two?", "prompt_tokens": 27}),
    ("the third", "Three?\r", {"prompt_tokens": 42}),
    ("the fourth", "Four?\r", {"prompt_tokens": 57}),
    ("the oldest turns are left out", "word " * 80 + "\r", r"\(the context is full: the oldest 2 of 4 turns are left"),
    ("/save", "/save conversation.jsonl\r", "saved 5 of 5 turns to"),
    ("/clear", "/clear\r", "forgotten"),
    ("the first again", "One?\r", {"prompt_tokens": 12}),
    ("input for the second", "/input leaf\r", r"\(input: 1 line\) > $"),
    ("the second with it", "Two?\r", {"instruction": "Two?", "input": "leaf"}),
    ("/save with an input", "/save asked.jsonl\r", "saved 2 of 2 turns to"),
]
PLAIN: Table = [
    ("a line", "One?\r", r" word word word\s"),
    ("quotes", '"""\rfirst\rlast\r"""\r', r" word word word\s"),
    ("Ctrl-C", "\x03", r"Ctrl-C again leaves"),
    ("/set", "/set top_k 3\r", "top_k +3 "),
]
# other chats: how they are begun, what is typed and what shows, how they are left, and the exit code
EACH: list[tuple[str, dict[str, Any], Table, list[str], int]] = [
    *((f"left by {words}", {}, [ANSWER], [f"{words}\r"], 0) for words in ("exit", "quit", "/exit", "/quit", " /bye ")),
    ("the end, at once", {}, [], ["\x04"], 0),
    ("the end, after a line was taken back", {}, [], ["abc", "\x15", "\x04"], 0),
    ("the end, after an answer", {}, [ANSWER], ["\x04"], 0),
    ("the end, after Ctrl-C", {}, [("a hint", "\x03", "again leaves")], ["\x04"], 0),
    ("the end, while input waits", {}, [("input", "/input a\r", "line")], ["\x04"], 0),
    ("the end, between quotes", {}, [], ['"""abc\r', "\x04"], 0),
    ("the end, in an answer", {"flags": (*ENDLESS, "--max_new_tokens", "500")}, [], ["One?\r", "\x04"], 0),
    ("Ctrl-C twice", {}, [("a hint", "\x03", "again leaves")], ["\x03"], 130),
    ("Ctrl-C together with another signal", {"before": woken_all_the_time},
     [("a hint", "\x03", "again leaves"), ("nothing", "\r", r"^\s*> $")] * 9, ["\x04"], 0),
    ("Ctrl-C in an answer", {"flags": ENDLESS}, STOPPED, ["exit\r"], 0),
    ("a full context", {"flags": (*ENDLESS, "--checkpoint", "small.pt")},
     [("a full context", "One?\r", r"\(the context is full\)")], ["\x04"], 0),
    ("several turns", {"flags": (*ENDLESS, "--checkpoint", "multi.pt", "--json", "--max_new_tokens", "2")}, MULTI,
     ["\x04"], 0),
    ("without readline", {"before": lambda: sys.modules.update(readline=None), "flags": SHORT}, PLAIN[:2], ["\x04"], 0),
    ("TERM=dumb", {"environment": {"TERM": "dumb"}}, PLAIN, ["\x04"], 0),
    ("40 columns", {"columns": 40}, [ANSWER], ["\x04"], 0),
    ("NO_COLOR", {"environment": {"NO_COLOR": "1"}}, [ANSWER], ["\x04"], 0),
    ("LC_ALL=C", {"environment": {"LC_ALL": "C"}, "before": partial(locale.setlocale, locale.LC_ALL, "C")},
     [ANSWER, ("a character that it lacks", "café?\r", r" word word word\s+\(cut at 3")], ["\x04"], 0),
    ("an encoding without the character", {"environment": {"PYTHONIOENCODING": "ascii"},
                                           "flags": (*SHORT, "--checkpoint", "accent.pt")},
     [("escaped", "One?\r", r"\\U?\w+.*\s+\(cut at 3")], ["\x04"], 0),
    ("stdout closed", {"before": partial(os.close, 1)}, [("an unseen answer", "One?\r", r"\(cut at 3")], ["exit\r"], 0),
    ("stderr closed", {"before": partial(os.close, 2)}, [ANSWER], ["exit\r"], 0),
    ("stdin closed", {"before": partial(os.close, 0)}, [], [], 0),
    ("stdout in a file", {"before": lambda: os.dup2(os.open("answers.txt", os.O_WRONLY | os.O_CREAT), 1)},
     [("notes", "One?\r", r"\(cut at 3")], ["exit\r"], 0),
    ("no history", {"environment": {"HOME": "/proc"}}, [
        ("one warning", "One?\r", r"warning: /proc/.gpt2_instruct_history.jsonl: the history is not kept: "),
        ("and no more", "Two?\r", r"^(?!.*warning)")], ["exit\r"], 0),
    ("a full disk", {"before": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))}, [
        ("no history", "One? Two? Three? Four?\r", r"history is not kept: File too large"),
        ("/save", "/save full.jsonl\r", r"error: full.jsonl: File too large; choose another name")], ["exit\r"], 0),
]


def play(name: str, rows: Table, leaving: list[str], code: int, flags: tuple[str, ...] = SHORT, **how: Any) -> None:
    """One chat. Notes are dim, unless the environment says that the terminal is plain."""
    begin(name)
    session, environment = Session(*flags, **how), how.get("environment", {})
    is_dumb = environment.get("TERM") == "dumb"
    if rows or leaving:
        session.see()
    for situation, keys, expected in rows:
        begin(f"{name}: {situation}")
        found = session.do(keys)
        check(found, expected)
        assert ("\x1b[2m(cut" in session.raw) == ("(cut" in found and not is_dumb and "NO_COLOR" not in environment)
        assert not (is_dumb and "\x1b" in session.raw)
    for keys in leaving:
        os.write(session.screen, keys.encode())
        time.sleep(0.02)
    session.end(code)


def history() -> None:
    """Of one chat in the next, capped, and for nobody else to read."""
    path, answer, flags = FOLDER / ".gpt2_instruct_history.jsonl", {"stopped": "length"}, (*SHORT, "--json")
    path.write_text("junk\n7\n" + "".join(f'"old {number}"\n' for number in range(1500)))
    play("history", [("to remember", paste("a\nb") + "\r", answer)], ["\x04"], 0, flags)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(entries) == 1000 and entries[-2:] == ["old 1499", "a\nb"] and path.stat().st_mode & 0o777 == 0o600
    play("the next chat", [
        ("recalls it", "\x1b[A\r", {"instruction": "a\nb"}),
        ("and what was before", "\x1b[A" * 3 + "\r", {"instruction": "old 1499"})], ["\x04"], 0, flags)
    before = path.read_bytes()
    play("--no_history", [("recalls nothing", "\x1b[A\r", r"^\s*(\x07)?\s*> $"),
                          ("and keeps nothing", "Secret?\r", answer)], ["\x04"], 0, (*flags, "--no_history"))
    assert path.read_bytes() == before
    path.unlink()
    os.mkfifo(path)  # as a link to /dev/null would be
    play("a history that keeps nothing", [("answers", "Secret?\r", answer)], ["\x04"], 0, flags)
    assert path.is_fifo()
    path.unlink()


def ended_by_sigterm() -> None:
    """At the prompt the terminal is as it was before; in an answer too."""
    for name, keys in (("at the prompt", "half a line"), ("in an answer", "One?\r")):
        begin(f"SIGTERM {name}")
        session = Session(*ENDLESS)
        before, kept = termios.tcgetattr(session.screen), os.dup(session.screen)
        session.see()
        session.type(keys, r"line$|word word")
        os.kill(session.pid, signal.SIGTERM)
        session.end(143)
        assert termios.tcgetattr(kept)[:4] == before[:4]
        os.close(kept)


def interrupted_at_random() -> None:
    """200 times. A letter after each, so that no two come at an empty prompt."""
    begin("200 times Ctrl-C")
    session, chance = Session(*ENDLESS, "--max_new_tokens", "60"), random.Random(0)
    session.see()
    for _ in range(200):
        for keys in ("Q\r", "\x03"):
            os.write(session.screen, keys.encode())
            time.sleep(chance.random() * 0.02)
        session.type("x", "> x")  # until readline has it: what only the terminal has, the next would discard
    check(session.type("\x15/help\r", r"/exit[^>]*> $"), "/input")
    os.write(session.screen, b"exit\r")
    session.end(0)


def stopped_and_continued() -> None:
    """The real program from a shell: Ctrl-Z and fg restore the prompt and what was typed."""
    begin("Ctrl-Z and fg")
    session = Session(before=lambda: os.execlp("bash", "bash", "--norc", "--noprofile", "-i"),
                      environment={"PS1": "shell% "})
    session.see("shell% $")
    session.type(f"{sys.executable} {SRC}/chat.py --json {' '.join(SHORT)}\r")
    session.type("half", "half$")
    check(session.type("\x1a", "shell% $"), "Stopped")
    check(session.type("stty -a | grep -c ' icanon'\r", "shell% $"), r"\s1\s")  # the shell's terminal meanwhile
    check(session.type("fg\r", "half$"), r"> half$")
    check(session.type(" done?\r"), {"instruction": "half done?"})
    check(session.type(paste("a\nb") + "\r"), {"instruction": "a\nb"})
    session.type("\x04", "shell% $")
    os.write(session.screen, b"exit\r")
    session.end(0)


def main() -> None:
    word, accent = (tokenizer().encode_ordinary(text)[0] for text in (" word", "\u00e9"))
    write_parrot(FOLDER / "parrot.pt", word, 4096)
    write_parrot(FOLDER / "small.pt", word)
    write_parrot(FOLDER / "multi.pt", word, 128, multi_turn=True)
    write_parrot(FOLDER / "accent.pt", accent)
    (FOLDER / "file.txt").write_bytes(b"\xef\xbb\xbfin a\nfile\n")
    (FOLDER / "long.txt").write_text("word " * 5000)
    play("asking", ASKING, ["/bye\r"], 0, (*ENDLESS, "--json", "--max_new_tokens", "2", "--temperature", "0.7"))
    for name, how, rows, leaving, code in EACH:
        play(name, rows, leaving, code, **how)
    for play_more in (history, ended_by_sigterm, interrupted_at_random, stopped_and_continued):
        play_more()
    begin("a full disk leaves no part of a file")
    assert not [*FOLDER.glob("full.*"), *FOLDER.glob(".gpt2*.tmp")]
    begin("stdout in a file has answers only")
    assert (FOLDER / "answers.txt").read_text() == " word word word\n"


if __name__ == "__main__":
    main()
