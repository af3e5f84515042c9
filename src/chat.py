"""Chat with a fine-tuned GPT-2 in a terminal.

    ./chat.sh [CHECKPOINT] [flags...]
    ./chat.sh --prompt "Name three primary colours."        answers once and exits

Every question stands alone: the model was trained on single questions, so nothing is remembered between them.
"""

from __future__ import annotations

import codecs
import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from cli import CheckpointError, Parser, UserError, number, printable, printable_line, run
from durable import is_sealed

if TYPE_CHECKING:
    from model import GPT

CHECKPOINT_DIR = Path("checkpoints_instruct")
LONGEST_TOKEN = 128  # characters: a longer question than this times the context need not be tokenized
HELP = """Type a question and press Enter.
  /input TEXT   give the next question an input to work on (/input alone removes it)
  /help         this list
  /exit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


def parse_options(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="default: best_model.pt of checkpoints_instruct/, or latest.pt")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits: more than twice as fast on a CPU")
    parser.add_argument("--prompt", help="answer this once and exit")
    parser.add_argument("--input", default="", help="the input that goes with --prompt, or with the first question")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=256,
                        help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=number(float, 0), default=0.7,
                        help="0 takes the likeliest token every time (default: %(default)s)")
    parser.add_argument("--top_k", type=number(int, 0), default=50,
                        help="sample among this many; 0 means all (default: %(default)s)")
    parser.add_argument("--top_p", type=number(float, 0, 1, above=True), default=0.95,
                        help="sample among the likeliest that sum to this (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0), help="makes the answers reproducible")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    return parser.parse_args(argv)


def find_checkpoint(given: Path | None) -> Path:
    """The checkpoint to chat with. Raises UserError when there is none."""
    for path in [given] if given else [CHECKPOINT_DIR / "best_model.pt", CHECKPOINT_DIR / "latest.pt"]:
        if path.exists():
            return path
    raise UserError(f"{given}: no such checkpoint" if given else
                    f"no checkpoint in {CHECKPOINT_DIR}: fine-tune first (./start_instruct_training.sh), or try the "
                    "demo (./start_instruct_training.sh demo, then ./chat.sh demo)")


class Interrupt:
    """Turns Ctrl-C during an answer into a flag; outside an answer it clears the line."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        self.asked = True


@dataclass
class Answer:
    """What one question led to, filled in while the answer is streamed."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = "length"  # length, end (the model was done) or interrupt


class Chat:
    """A model and how it answers."""

    def __init__(self, model: GPT, options: Namespace) -> None:
        import torch

        from generate import Sampling

        self.model, self.options = model, options
        self.sampling = Sampling(options.temperature, options.top_k, options.top_p)
        self.generator = torch.Generator()
        self.generator.manual_seed(options.seed) if options.seed is not None else self.generator.seed()

    def stream(self, question: str, input: str, answer: Answer) -> Iterator[str]:
        """Yield the answer as printable pieces of text; whole characters only. Raises UserError when the question
        does not fit the model's context."""
        from generate import generate
        from instruct_format import END_OF_TEXT, encode_prompt, tokenizer

        context_length = self.model.config.context_length
        hopeless = len(question) + len(input) > LONGEST_TOKEN * context_length
        prompt = [] if hopeless else encode_prompt(question, input)
        room = context_length - len(prompt)
        if hopeless or room < 1:
            raise UserError(f"the question has {len(prompt) or 'far more'} tokens, too many for a context of "
                            f"{context_length}; shorten it")
        begin = time.perf_counter()
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        limit = min(self.options.max_new_tokens, room)
        with Interrupt() as interrupt:
            for token in generate(self.model, prompt, limit, self.sampling, END_OF_TEXT, self.generator):
                answer.tokens += 1
                piece = printable(utf8.decode(tokenizer().decode_single_token_bytes(token)))
                answer.text += piece
                yield piece
                if interrupt.asked:
                    break
        last = printable(utf8.decode(b"", final=True))
        answer.text += last
        yield last
        answer.stopped = "interrupt" if interrupt.asked else "length" if answer.tokens == limit else "end"
        answer.seconds = time.perf_counter() - begin

    def answer(self, question: str, input: str) -> Answer:
        """Answer on stdout: streamed text, or one line of JSON with --json."""
        answer = Answer()
        for piece in self.stream(question, input, answer):
            if not self.options.json:
                print(piece, end="", flush=True)
        print(json.dumps({"instruction": question, "input": input, "response": answer.text, "tokens": answer.tokens,
                          "seconds": round(answer.seconds, 3), "stopped": answer.stopped}) if self.options.json else "")
        sys.stdout.flush()
        return answer

    def converse(self) -> None:
        """Questions from stdin, a line each, until it ends."""
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            import readline  # noqa: F401  (line editing and history for input())
        input_text = self.options.input
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


def _file_number(path: Path) -> int | None:
    """What tells a file from another that takes its name; None for a file that is gone."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _check(path: Path, checked: Future[bool]) -> None:
    try:
        checked.set_result(is_sealed(path))
    except BaseException as error:
        checked.set_exception(error)


def open_chat(options: Namespace) -> Chat:
    """Load the checkpoint and say on stderr which one it is."""
    path = find_checkpoint(options.checkpoint)
    before = _file_number(path)
    checked: Future[bool] = Future()
    Thread(target=_check, args=(path, checked), daemon=True).start()  # beside the imports, which take longer
    import torch

    from checkpoint import load, model_of
    from decode_weights import for_decoding
    from instruct_format import TEMPLATE
    from processes import device_named

    device = torch.device(device_named(options.device))
    state = load(path, checked)
    if _file_number(path) not in (before, None):  # a run has saved a better one meanwhile
        state = load(path)
    if state.get("template") != TEMPLATE:
        raise CheckpointError(f"{path}: fine-tuned with template {state.get('template')!r}, chat knows {TEMPLATE!r}"
                              if state.get("template") else f"{path}: a pre-trained model; fine-tune it first")
    model = model_of(state, path, device)
    if options.quantize and device.type != "cpu":
        raise UserError(f"--quantize int8 is for CPUs, not for {device.type}; leave it out, or add --device cpu")
    if device.type == "cpu":
        for_decoding(model, int8=options.quantize is not None)
    losses = [loss for step, loss in state["val_losses"] if step == state["step"]]
    loss = f", val loss {losses[0]:.4f}" if losses else ""
    print(printable_line(f"{path}: step {state['step']}{loss}, on {device.type}; /help lists the commands"),
          file=sys.stderr)
    return Chat(model, options)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    chat = open_chat(options)
    if options.prompt is None:
        chat.converse()
        return 0
    return 130 if chat.answer(options.prompt, options.input).stopped == "interrupt" else 0


if __name__ == "__main__":
    run(main)
