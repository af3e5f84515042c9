"""Lines in: messages typed or pasted at a terminal, their history, and what signals do meanwhile."""

import fcntl
import json
import os
import re
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from data.values import parse_json

try:
    import readline
except ImportError:  # some builds of Python lack it: no editing and no history then
    readline = None  # type: ignore[assignment]

# as in the Pythons of uv: Tab has another name there, and after Ctrl-C the line before still seems to be typed
IS_LIBEDIT = readline is not None and "libedit" in (readline.__doc__ or "")
HISTORY = "~/.gpt2_instruct_history.jsonl"
LONGEST_HISTORY = 1000
QUOTES = '"""'
Result = TypeVar("Result")


class Signals:
    """What signals do while this context is open. Ctrl-C sets interrupted, until that is reset, and wait() raises
    KeyboardInterrupt then; SIGTERM leaves, with the terminal as it was; Ctrl-Z gives the terminal to the shell for a
    while."""

    interrupted = waiting = False
    thrown: BaseException | None = None  # on its way from a handler to whoever catches it
    typed = prompt = ""  # what stood at the prompt when Ctrl-C came; the prompt of the line that is waited for

    def __enter__(self) -> "Signals":
        handlers = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate, signal.SIGALRM: self._wake}
        # whether lines can be edited; where stdout is a file, input() would put the prompt into it
        self.edits = readline is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.is_dumb = os.environ.get("TERM", "dumb") == "dumb"  # a terminal that shows sequences instead of obeying
        if self.edits:
            self.plain = termios.tcgetattr(sys.stdin)
            handlers[signal.SIGTSTP] = self._suspend
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self, read: Iterable[Result]) -> Result:
        """The one result of read, an iterator written in C that waits for input. Between it and the list no Python
        runs, so that a Ctrl-C right after Enter cannot lose the line: it stops the answer, or the wait for the next.
        """
        self.typed, results = "", list[Result]()
        try:
            self._flush_at_ctrl_c(False)
            self.waiting = True
            if self.interrupted:
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # wakes what sleeps through a signal that came just before
            results.extend(read)
        except KeyboardInterrupt:
            if not results:
                raise
        finally:
            self.waiting, self.thrown = False, None
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._flush_at_ctrl_c(True)
        return results[0]

    def _flush_at_ctrl_c(self, does: bool) -> None:
        """Whether the terminal drops what nobody has read yet. While readline waits it must not: readline has seen that
        there is a letter, and would wait for it for ever, deaf to the Ctrl-C."""
        if self.edits:
            mode: list[Any] = [*self.plain]
            mode[3] |= 0 if does else termios.NOFLSH
            termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        if self.waiting:
            self.waiting = False
            self.typed = readline.get_line_buffer() if readline and not IS_LIBEDIT else ""
            self._throw(KeyboardInterrupt())

    def _terminate(self, *_: object) -> None:
        self._throw(SystemExit(128 + signal.SIGTERM))

    def _throw(self, error: BaseException) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.thrown = error
        raise error

    def _wake(self, *_: object) -> None:
        """What sleeps is awake by now. Python 3.10 may call this while an exception is on its way: raise that again."""
        error, self.thrown = self.thrown, None
        if error:
            raise error

    def _suspend(self, *_: object) -> None:
        """Python's readline does not do this: it leaves the terminal as it is, and forgets the prompt."""
        editing, pasting = termios.tcgetattr(sys.stdin), self.waiting and not self.is_dumb
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
    """Messages from a terminal: one line, a paste, or several lines between quotes. Where they can be edited they can
    be recalled too, in later chats if keep_history."""

    def __init__(self, signals: Signals, complete: Callable[[str], Iterable[str]], keep_history: bool,
                 say: Callable[[str], None]) -> None:
        """complete takes the line so far and gives its possible last words; say is called once if the history cannot
        be kept."""
        self.signals, self.complete, self.keep_history, self.say = signals, complete, keep_history, say
        self.path = Path(os.path.realpath(os.path.expanduser(HISTORY)))
        if signals.edits:
            readline.parse_and_bind(f"set enable-bracketed-paste {'off' if signals.is_dumb else 'on'}")
            readline.parse_and_bind("bind ^I rl_complete" if IS_LIBEDIT else "tab: complete")
            readline.set_completer_delims(" ")
            readline.set_completer(self._completion)
            readline.set_auto_history(False)
            self._remember()

    def read(self, prompt: str) -> str:
        """A message. Raises EOFError at the end, KeyboardInterrupt after Ctrl-C."""
        self.signals.interrupted = False  # it stopped the last answer
        text = self._line(prompt)
        # of text in which the quotes are closed before its end, code with a docstring for instance, they are a part
        if quoted := re.fullmatch(rf"\s*(/input |){QUOTES}((?!.*{QUOTES}\s*[^\s\"]).*)", text, re.DOTALL):
            text = self._quoted(*quoted.groups())
        if text.strip() and self.signals.edits:
            self._remember(text)
        return text

    def _quoted(self, command: str, text: str) -> str:
        """Text up to the line that ends with quotes; of its own it is no command, even if it begins like one."""
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line("... ")
        text = text.rstrip().removesuffix(QUOTES).strip("\n")
        return (command or "/" * text.startswith("/input" if "\n" in text else "/")) + text

    def _line(self, prompt: str) -> str:
        if not self.signals.edits:
            print(prompt, end="", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
            prompt = ""
        elif select.select([sys.stdin], [], [], 0)[0] and not any(fcntl.ioctl(sys.stdin, termios.FIONREAD, bytes(4))):
            raise EOFError  # Ctrl-D during an answer, which readline would not see
        self.signals.prompt = prompt
        try:
            return self.signals.wait(map(input, (prompt,)))
        except (OSError, termios.error) as error:  # the terminal is gone
            raise EOFError from error

    def _completion(self, word: str, number: int) -> str | None:
        found = [f"{name} " for name in self.complete(readline.get_line_buffer()) if name.startswith(word)]
        return found[number] if number < len(found) else None

    def _remember(self, *more: str) -> None:
        """Have the arrow keys bring back these messages, which are added to those of all chats in the file, or without
        any those of the file, where lines that hold none are passed over. It is replaced whole, after other chats may
        have added to it."""
        entries: list[str] = []
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.keep_history &= self.path.is_file() or self.path.is_dir() or not self.path.exists()  # no /dev/null
            kept = self.path.read_bytes() if self.keep_history and self.path.exists() else b""
            lines = map(parse_json, kept.decode(errors="replace").splitlines())
            entries = [entry for entry in (*lines, *more) if type(entry) is str][-LONGEST_HISTORY:]
            if more and self.keep_history:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    file.writelines(f"{json.dumps(entry)}\n" for entry in entries)
                temporary.replace(self.path)
        except OSError as error:
            self.keep_history = False
            with suppress(OSError):
                temporary.unlink()
            self.say(f"warning: {self.path}: the history is not kept: {error.strerror}")
        for entry in more or entries:
            with suppress(ValueError):  # the locale's encoding lacks its characters
                readline.add_history(entry)
