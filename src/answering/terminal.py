"""Lines in, text out: a conversation on a terminal or through pipes. Nothing that a model says drives the terminal."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import torch

from answering.answer import Answer
from answering.settings import Settings
from cli import printable, printable_line
from errors import UserError
from model import GPT

HELP = """Type a question and press Enter.
  /input TEXT   give the next question an input to work on (/input alone removes it)
  /help         this list
  /exit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A model, how it answers, and how answers are shown."""

    def __init__(self, model: GPT, settings: Settings, as_json: bool = False) -> None:
        self.model, self.settings, self.as_json = model, settings, as_json
        self.generator = torch.Generator()
        self.generator.manual_seed(settings.seed) if settings.seed is not None else self.generator.seed()

    def answer(self, question: str, input: str = "") -> Answer:
        """Answer on stdout: streamed text, or one line of JSON. Ctrl-C stops it. Raises UserError when the question
        does not fit the model's context."""
        answer = Answer(self.model, question, input, self.settings, self.generator)
        with _interrupt() as interrupted:
            for piece in answer.pieces(interrupted.is_set):
                if not self.as_json:
                    print(printable(piece), end="", flush=True)
        print(json.dumps({"instruction": question, "input": input, "response": printable(answer.text),
                          "tokens": answer.tokens, "seconds": round(answer.seconds, 3), "stopped": answer.stopped})
              if self.as_json else "", flush=True)
        return answer

    def converse(self, input_text: str = "") -> None:
        """Questions from stdin, a line each, until it ends. input_text goes with the first."""
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            import readline  # noqa: F401  (line editing and history for input())
        while (line := _read_line("> " if at_terminal else "")) is not None:
            command, _, rest = line.partition(" ")
            if command == "/exit":
                break
            if command == "/input":
                input_text = rest.strip()
            elif command == "/help" or command.startswith("/"):
                print(HELP if command == "/help" else f"unknown command {printable_line(command)}\n{HELP}")
            elif command:
                try:
                    self.answer(line, input_text)
                    input_text = ""
                except UserError as error:
                    print(f"error: {printable_line(error)}", file=sys.stderr)
                except KeyboardInterrupt:  # before the answer began
                    print()
        if at_terminal:
            print()


@contextmanager
def _interrupt() -> Iterator[Event]:
    """Inside, Ctrl-C sets the event instead of raising KeyboardInterrupt."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line(prompt: str) -> str | None:
    """A stripped line of stdin; empty after Ctrl-C, None at the end. Raises UserError when it is not UTF-8."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error.reason})") from error
