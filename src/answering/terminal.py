"""Answers on stdout: to one question, to those of a pipe, or in a conversation at a terminal, with its commands.

Everything else goes to stderr, or to the screen of a conversation. Nothing that a model says drives the terminal.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from answering.answer import Answer, Question
from answering.batch import WIDTH
from answering.decode_weights import OneRowInt8
from answering.lines import Lines, Signals
from answering.questions import answer_together, questions_of, text_of
from answering.settings import TABLE, Settings, changed
from cli import fill, printable, printable_line, write
from errors import UserError, errors_at
from instruct_format import with_input
from model import GPT
from weights.safe_load import check_is_file

COMMANDS = {
    "/input": "TEXT or @FILE: what the next question is about; alone: nothing",
    "/set": "NAME VALUE: how answers are made; alone: shows it, and the last one's speed",
    "/regen": "answer the last question again",
    "/save": "FILE: the conversation, as JSON lines that can be prepared",
    "/clear": "forget the conversation",
    "/help": "this list",
    "/exit": "leave (so do /quit, /bye, exit, quit, Ctrl-D)",
}
LEAVING = ("/exit", "/quit", "/bye", "exit", "quit")
HELP = "\n".join([
    'Type a question and press Enter. A paste is one message, and so are lines between """ and """.',
    "Ctrl-C stops an answer. // begins a question with a slash.",
    *(f"  {name:8}{meaning}" for name, meaning in COMMANDS.items())])


class Chat:
    """A model, how it answers, how answers are shown, and what was said."""

    def __init__(self, model: GPT, checkpoint: str, settings: Settings, *, remembers: bool, as_json: bool) -> None:
        """remembers: whether the model is to know of the turns before, in a conversation."""
        self.model, self.checkpoint, self.settings = model, checkpoint, settings
        self.remembers, self.as_json = remembers, as_json
        self.signals = Signals()
        self.at_terminal = False
        self.input = ""  # for the next question
        self.last: Answer | None = None
        self.turns: list[Answer] = []  # those with a text

    def answer_one(self, instruction: str, input: str) -> int:
        """The exit code. Raises UserError when the question does not fit."""
        with self.signals:
            self._write_answer(Answer(self.model, instruction, input, self.settings))
            return 130 * self.signals.interrupted

    def answer_all(self, input: str, as_objects: bool) -> int:
        """Answer the lines of stdin; input goes with the first. Returns the exit code: 0, or 130 after Ctrl-C. Raises
        UserError at the end if one was not answered."""
        n_lines = n_failed = 0
        together = as_objects and not isinstance(self.model.output, OneRowInt8)  # which is for one row
        with self.signals:
            lines = questions_of(lambda: self.signals.wait(map(sys.stdin.buffer.readline, (-1,))), input, as_objects,
                                 lambda question: Answer(self.model, *question, self.settings))
            while not self.signals.interrupted and (batch := list(islice(lines, WIDTH if together else 1))):
                if together:
                    answer_together([answer for _, answer in batch if isinstance(answer, Answer)],
                                    lambda: self.signals.interrupted)
                for question, answer in batch:
                    n_lines += 1
                    if isinstance(answer, UserError):
                        n_failed += 1
                        self._write_error(str(answer), question)
                    elif together and answer.known is None:
                        break  # after Ctrl-C
                    else:
                        self._write_answer(answer)
        if self.signals.interrupted:
            return 130
        if input and not n_lines:
            raise UserError("no question for the --input")
        if n_failed:
            raise UserError(f"{n_failed} of {n_lines} questions were not answered")
        return 0

    def converse(self, input: str, keep_history: bool) -> int:
        """Messages from the terminal until they end; input goes with the first question. Returns the exit code."""
        self.at_terminal, self.input, is_warned = True, input, False
        with self.signals:
            lines = Lines(self.signals, self._complete, keep_history, self.say)
            while True:
                n_lines = self.input.count("\n") + 1
                try:
                    text = lines.read(f"(input: {n_lines} line{'s' * (n_lines > 1)}) > " if self.input else "> ")
                    is_warned = False
                    if text.strip() in LEAVING:
                        return 0
                    self._obey(text if "\n" in text.strip() else text.strip())
                except EOFError:
                    self.say("")
                    return 0
                except KeyboardInterrupt:
                    if is_warned and not self.signals.typed:
                        self.say("")
                        return 130
                    is_warned = not self.signals.typed
                    self.say("\n(Ctrl-C again leaves, and so do Ctrl-D and /exit)" * is_warned)
                except UserError as error:
                    self.say(f"error: {printable_line(error)}")

    def _obey(self, text: str) -> None:
        """A message of the conversation: a command or a question. Raises UserError."""
        if (question := _question_in(text)) is not None:
            if question.strip():
                self._ask(Question(question, self.input))
                self.input = ""
            return
        command, rest = (re.split(r"\s", text, maxsplit=1) + [""])[:2]
        match command:
            case "/input":
                self.input = _input_of(rest)
            case "/set":
                self._set(*rest.split(None, 1))
            case "/regen":
                if self.last is None:
                    raise UserError("there is no question yet")
                self.turns = [turn for turn in self.turns if turn is not self.last]
                self._ask(self.last.question)
            case "/save":
                self._save(rest.strip())
            case "/clear":
                self.turns, self.last, self.input = [], None, ""
                self.say("forgotten")
            case "/help":
                self.say(HELP)
            case _:
                nearest = get_close_matches(command, [*COMMANDS, *LEAVING], 1)
                meant = f", did you mean {nearest[0]}?" if nearest else ""
                raise UserError(f"no command {command}{meant}; /help lists them, // begins a question with a slash")

    def _ask(self, question: Question) -> None:
        """Answer, and remember it."""
        answer = self.last = Answer(self.model, *question, self.settings, self.turns if self.remembers else ())
        if self.remembers and (left_out := len(self.turns) - answer.n_turns):
            self.say(f"the context is full: the oldest {left_out} of {len(self.turns)} turns are left out", dim=True)
        self._write_answer(answer)
        if answer.text.strip():
            self.turns.append(answer)

    def _set(self, name: str = "", value: str = "") -> None:
        """Change a setting, or show all, or one."""
        if name and name not in TABLE:
            raise UserError(f"no setting {name}; there are {', '.join(TABLE)}")
        if value:
            self.settings = changed(self.settings, name, value.strip())
        for shown in [name] if name else TABLE:
            found = getattr(self.settings, shown)
            self.say(f"{shown:20}{'none' if found is None else found!s:8}{TABLE[shown][1]}")
        if self.last and not name:
            last, context = fields_of(self.last, ""), self.model.config.context_length
            self.say(f"last answer: {last['tokens']} tokens in {last['seconds']:.2f} s, the first after "
                     f"{self.last.first_seconds:.2f} s, {last['tokens_per_second']} tokens/s; context "
                     f"{last['prompt_tokens'] + last['tokens']} of {context}; seed {last['seed']}")

    def _save(self, name: str) -> None:
        """The turns, each an example; as one conversation where the model knows of earlier ones. Those that Ctrl-C
        stopped are left out."""
        turns = [turn for turn in self.turns if turn.stopped != "interrupt"]
        if not name or not turns:
            raise UserError("/save needs the name of a file" if turns else "there is nothing to save yet")
        rows: list[object] = [{**turn.question._asdict(), "output": turn.text} for turn in turns]
        if self.remembers:
            rows = [{"messages": [{"role": role, "content": text} for turn in turns for role, text in (
                ("user", with_input(*turn.question)), ("assistant", turn.text))]}]
        path = Path(os.path.expanduser(name))
        with errors_at(path, ValueError, advice="; choose another name"), path.open("x", encoding="ascii") as file:
            try:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
                file.flush()
            except OSError:
                path.unlink()
                raise
        self.say(f"saved {len(turns)} of {len(self.turns)} turns to {printable_line(path)}")

    def _complete(self, line: str) -> Iterable[str]:
        """What the last word of a line may be."""
        return TABLE if line.startswith("/set ") else COMMANDS if line.startswith("/") and " " not in line else ()

    def say(self, text: str, dim: bool = False) -> None:
        """A line for the user that is no answer; one by the way is in brackets, and dim where the terminal can."""
        stream = sys.stdout if self.at_terminal and sys.stdout.isatty() else sys.stderr
        text = "\n".join(map(fill, (f"({text})" if dim else text).split("\n")))
        if dim and stream.isatty() and not os.environ.get("NO_COLOR") and not self.signals.is_dumb:
            text = f"\x1b[2m{text}\x1b[0m"
        write(f"{text}\n", stream)

    def _write_answer(self, answer: Answer) -> None:
        """Make the answer and write it: streamed text, or one line of JSON. Ctrl-C ends it."""
        for piece in answer.pieces(lambda: self.signals.interrupted):
            if not self.as_json:
                write(printable(piece), sys.stdout)
        if self.as_json:
            self._write_json(fields_of(answer, self.checkpoint))
        else:
            write("\n", sys.stdout)
            setting = f"{'/set ' if self.at_terminal else '--'}max_new_tokens"
            notes = {"length": f"cut at {answer.tokens} tokens: {setting}", "context": "the context is full",
                     "interrupt": "stopped"}
            if answer.stopped in notes:
                self.say(notes[answer.stopped], dim=True)

    def _write_error(self, text: str, question: Question) -> None:
        if self.as_json:
            self._write_json({**question._asdict(), "error": text})
        else:
            self.say(f"error: {printable_line(text)}")

    def _write_json(self, fields: dict[str, object]) -> None:
        write(json.dumps(fields).replace("\x7f", "\\u007f") + "\n", sys.stdout)


def _question_in(message: str) -> str | None:
    """The question that a message is, None for a command. Of several lines only /input is one, as code may begin with
    // or /*."""
    if "\n" in message.strip() and not message.startswith(("/input", "//input")):
        return message
    return None if re.match("/(?!/)", message) else message.removeprefix("/")


def first_line(path: Path, state: dict[str, Any], device: str, ending: str) -> str:
    """What the model is and how it takes questions, in a line of at most 80 columns. ending is for a conversation."""
    size = sum(tensor.numel() for tensor in state["model"].values()) / 1e6
    losses = [loss for step, loss in state["val_losses"] if step == state["step"]]
    facts = ["", f"{size:.{0 if size >= 10 else 1}f}M", *(f"val loss {loss:.4f}" for loss in losses[:1]), device]
    text = ", ".join(facts) + ": " + ("pre-trained, not fine-tuned" if state["template"] is None else
                                      "remembers the turns before" if state["multi_turn"] and ending else
                                      "each question stands alone") + ending
    room = 80 - len(text)
    name = printable_line(path if len(printable_line(path)) <= room else path.name)
    return (name if len(name) <= room else f"{name[:room - 3]}...") + text


def fields_of(answer: Answer, checkpoint: str) -> dict[str, Any]:
    """Everything about an answer, under the names that it has in JSON."""
    settings = answer.settings._asdict()
    del settings["seed"]  # drawn or not, it stands beside them
    return {**answer.question._asdict(), "response": answer.text, "tokens": answer.tokens,
            "seconds": round(answer.seconds, 3), "stopped": answer.stopped, "prompt_tokens": len(answer.prompt),
            "tokens_per_second": round(answer.tokens / max(answer.seconds, 1e-9), 1), "seed": answer.seed,
            "settings": settings, "checkpoint": checkpoint}


def _input_of(text: str) -> str:
    """What /input was told: a text, or the content of @FILE. Raises UserError when that is none."""
    name = text.strip()
    if not name.startswith("@") or "\n" in name:
        return text.strip("\n")
    path = Path(os.path.expanduser(name[1:].strip()))
    with errors_at(path):
        check_is_file(path)
        return text_of(path.read_bytes(), f"{path}: ").rstrip("\r\n")
