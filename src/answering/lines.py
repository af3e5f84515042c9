"""Lines in: messages typed or pasted at a terminal, their history, and what signals do meanwhile."""

import fcntl
import json
import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

try:
    import readline
except ImportError:  # some builds of Python lack it: no editing and no history then
    readline = None  # type: ignore[assignment]

HISTORY = "~/.gpt2_instruct_history.jsonl"
LONGEST_HISTORY = 1000
QUOTES = '"""'
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Signals:
    """What signals do while this context is open. Ctrl-C sets interrupted, until that is reset, and wait() raises
    KeyboardInterrupt then; SIGTERM leaves, with the terminal as it was; Ctrl-Z gives the terminal to the shell for a
    while."""

    interrupted = waiting = False
    typed = ""  # what stood at the prompt when Ctrl-C came
    prompt = ""  # of the line that is waited for

    def __enter__(self) -> "Signals":
        handlers = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate, signal.SIGALRM: lambda *_: None}
        if readline and sys.stdin.isatty():
            self.plain = termios.tcgetattr(sys.stdin)
            handlers[signal.SIGTSTP] = self._suspend
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self, read: Callable[[Argument], Result], argument: Argument) -> Result:
        """The result of read, a function written in C that waits for input. Between it and the list no Python runs, so
        that a Ctrl-C right after Enter cannot lose the line: it stops the answer, or the wait for the next line."""
        self.typed, results = "", list[Result]()
        for stream in (sys.stdout, sys.stderr):  # else input() does, and forgets a Ctrl-C that comes meanwhile
            with suppress(OSError, ValueError):
                stream.flush()
        try:
            self.waiting = True
            if self.interrupted:
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)  # wakes what sleeps through a signal that came just before
            results.extend(map(read, (argument,)))
        except KeyboardInterrupt:
            if not results:
                raise
        finally:
            self.waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return results[0]

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        if self.waiting:
            self.waiting = False
            self.typed = readline.get_line_buffer() if readline else ""
            raise KeyboardInterrupt

    def _terminate(self, *_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    def _suspend(self, *_: object) -> None:
        """Python's readline does not do this: it leaves the terminal as it is, and forgets the prompt."""
        editing, pasting = termios.tcgetattr(sys.stdin), self.waiting and os.environ.get("TERM", "dumb") != "dumb"
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.plain)
        os.write(sys.stdout.fileno(), b"\x1b[?2004l" * pasting)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # until the shell's fg
        signal.signal(signal.SIGTSTP, self._suspend)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, editing)
        if self.waiting:
            shown = self.prompt + readline.get_line_buffer()
            os.write(sys.stdout.fileno(), b"\x1b[?2004h" * pasting + shown.encode(errors="replace"))


class Lines:
    """Messages from a terminal: one line, a paste, or several lines between quotes. With the readline module they can
    be edited and recalled, in later chats too if keep_history."""

    def __init__(self, signals: Signals, complete: Callable[[str], Iterable[str]], keep_history: bool,
                 warn: Callable[[str], None]) -> None:
        """complete takes the line so far and gives its possible last words; warn is called once if the history cannot
        be kept."""
        self.signals, self.complete, self.keep_history, self.warn = signals, complete, keep_history, warn
        self.path = Path(os.path.realpath(os.path.expanduser(HISTORY)))
        self.edits = readline is not None and sys.stdout.isatty()  # else input() would put the prompt into a file
        if self.edits:
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.parse_and_bind("tab: complete")
            readline.set_completer_delims(" ")
            readline.set_completer(self._completion)
            readline.set_auto_history(False)
            self._keep(self._recall)

    def read(self, prompt: str) -> str:
        """A message. Raises EOFError at the end, KeyboardInterrupt after Ctrl-C, UnicodeDecodeError."""
        self.signals.interrupted = False  # it stopped the last answer
        text = self._line(prompt)
        for command in ("", "/input "):
            if text.lstrip().startswith(command + QUOTES):
                text = command + self._quoted(text.lstrip().removeprefix(command + QUOTES), is_command=bool(command))
                break
        if text.strip() and self.edits:
            readline.add_history(text)
            self._keep(lambda: self._remember(text))
        return text

    def _quoted(self, text: str, is_command: bool) -> str:
        """Text up to the line that ends with quotes; of its own it is no command, even if it begins with a slash."""
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line("... ")
        text = text.rstrip().removesuffix(QUOTES).strip("\n")
        return "/" * (text.startswith("/") and not is_command) + text

    def _line(self, prompt: str) -> str:
        if not self.edits:
            print(prompt, end="", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
            prompt = ""
        elif select.select([sys.stdin], [], [], 0)[0] and not any(fcntl.ioctl(sys.stdin, termios.FIONREAD, bytes(4))):
            raise EOFError  # Ctrl-D during an answer, which readline would not see
        self.signals.prompt = prompt
        try:
            line = self.signals.wait(input, prompt)
        except OSError as error:  # the terminal is gone
            raise EOFError from error
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _completion(self, word: str, number: int) -> str | None:
        found = [f"{name} " for name in self.complete(readline.get_line_buffer()) if name.startswith(word)]
        return found[number] if number < len(found) else None

    def _keep(self, work: Callable[[], None]) -> None:
        """Work on the history's file, unless that failed before."""
        try:
            if self.keep_history:
                work()
        except OSError as error:
            self.keep_history = False
            self.warn(f"{self.path}: the history is not kept: {error.strerror}")

    def _recall(self) -> None:
        for entry in self._history():
            with suppress(ValueError):  # no text: anything may stand in a file
                readline.add_history(entry)

    def _history(self) -> list[str]:
        """The messages of earlier chats; lines of the file that hold none are passed over."""
        entries = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, str)][-LONGEST_HISTORY:]

    def _remember(self, text: str) -> None:
        """Add to the file, which is read again, for other chats may have added to it, and replaced whole."""
        entries = [*self._history(), text][-LONGEST_HISTORY:]
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
                file.writelines(f"{json.dumps(entry)}\n" for entry in entries)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
