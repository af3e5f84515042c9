"""What a row means: its columns, known by the names that people give them, become the turns of an Example.

A row is a question with its answer (instruction, output, perhaps input), or a conversation: a list of messages with
roles, of questions with their answers, or of texts in turn.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, cycle
from numbers import Number as AnyNumber
from typing import Any, NamedTuple

from data.rows import ANSWERS, QUESTIONS, BadRow, Number, Source, parse_json, split_of
from instruct_format import join_texts, tidy

# The names of a column of each meaning, the likelier first, in any case
NAMES = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": QUESTIONS,
    "output": ANSWERS,
    "input": ("input", "context"),
    "system": ("system_prompt",),
    "split": ("split",),
}
MESSAGES_TOO = ("dialogue", "dialog", "chat", "turns", "data")  # in a row without question and answer
PAIR = ("instruction", "input", "output", "system")  # the meanings that make a question and its answer
NEEDED = {"instruction", "output"}
KNOWN_PAIRS = {"instruction/output": "Alpaca", "instruction/input/output": "Alpaca",
               "instruction/context/response": "Dolly", "question/response/system_prompt": "OpenOrca"}
SPEAKERS = {**dict.fromkeys(("user", "human", "prompter"), "user"),
            **dict.fromkeys(("system", "developer"), "system"),
            **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant")}
IGNORE_SPLIT = "; --columns split= ignores that column"
LONGEST_BLANK = 100_000  # the tokenizer fails from about a million blanks in a row on
_BLANK, _SURROGATE = re.compile(rf"\s{{{LONGEST_BLANK}}}"), re.compile("[\ud800-\udfff]")


class Turn(NamedTuple):
    """A question and its answer, tidy."""

    instruction: str
    input: str
    output: str


class Example(NamedTuple):
    """One checked row. split is None unless the row says where it belongs: train, val or test."""

    turns: tuple[Turn, ...]  # a system text is part of the first instruction
    split: str | None = None


class Shapes:
    """Reads rows as examples, and notes what a user wants to know of that: shapes, columns, what was changed."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns  # as the user says: the column of instruction, output and so on; "" for none
        self.known: dict[tuple[str, ...], dict[str, str]] = {}  # names of columns -> which has which meaning
        self.names: dict[str, None] = {}  # of the shapes found
        self.used: dict[str, None] = {}  # columns
        self.changes: Counter[str] = Counter()
        self.split_is_one: bool | None = None  # whether the first value in the column split is the name of one

    def examples(self, sources: Iterable[Source]) -> Iterator[tuple[str, Example | BadRow]]:
        """Yield (place, example or what is wrong with the row) for every row."""
        for source in sources:
            for number, (place, row) in enumerate(source.rows):
                example: Example | BadRow
                try:
                    example = self.example(row)
                except BadRow as bad:
                    example = bad
                    if number == 0:  # the other rows may be like it: to drop them all is no advice
                        bad.advice = ""
                yield f"{source.name}: {place}", example

    def example(self, row: Any) -> Example:
        """Raises BadRow where there is no meaning in the row, or no text where one must be."""
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow(f"expected an object with columns such as instruction and output, found {_kind(row)}")
        columns = self.known.get(tuple(row))
        if columns is None:
            columns = self.known[tuple(row)] = self._columns(row)
        split = self._split(row[columns["split"]], columns["split"]) if "split" in columns else None
        return Example(self._conversation(row, columns) or self._pair(row, columns), split)

    def _columns(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The column of each meaning: as the user says, else by their names."""
        free = {_plain(name): name for name in reversed(list(row))}
        found: dict[str, str | None] = {meaning: (name if name in row else free.get(_plain(name))) if name else None
                                        for meaning, name in self.columns.items()}
        if "instruction" in found or "output" in found:
            found.setdefault("messages")
        for meaning, names in NAMES.items():
            found.setdefault(meaning, next((free[name] for name in names if name in free
                                            and free[name] not in found.values()), None))
        if None in (found["instruction"], found["output"]) and "messages" not in self.columns:
            found["messages"] = found["messages"] or next((free[name] for name in MESSAGES_TOO if name in free), None)
        return {meaning: name for meaning, name in found.items() if name is not None}

    def _pair(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Turn, ...]:
        """The turn of a question and its answer."""
        pair = {meaning: columns[meaning] for meaning in PAIR if meaning in columns}
        if not pair.keys() >= NEEDED:
            if "messages" in columns:
                return ()
            raise BadRow(self._complaint(row, [meaning for meaning in PAIR if meaning in NEEDED - pair.keys()]))
        text = {meaning: self._text(row[name], f"column {name!r}") for meaning, name in pair.items()}
        self.names[_shape(*pair.values())] = None
        self.used |= dict.fromkeys(pair.values())
        question = join_texts(text.get("system", ""), text["instruction"])
        return (Turn(question, text.get("input", ""), text["output"]),)

    def _complaint(self, row: Iterable[str], missing: list[str]) -> str:
        """Why a row is no question and answer."""
        if named := [self.columns[meaning] for meaning in missing if self.columns.get(meaning)]:
            return f"no column {named[0]!r} (found: {_names(row)})"
        advice = "; say which it is: --columns instruction=NAME output=NAME"
        if "text" in map(_plain, row):
            advice += ("; where a text is a whole conversation, or one message of it, take a variant with messages or "
                       "pairs, such as philschmid/guanaco-sharegpt-style")
        return f"no column for the {' and for the '.join(missing)} (found: {_names(row)}){advice}"

    def _text(self, value: Any, where: str) -> str:
        """A value as text. Null and NaN are empty, numbers and booleans what JSON writes, a list of one text is it."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            [value] = value
            self.changes["lists of one text became it"] += 1
        if value is None or value != value or value in ([], {}):
            return ""
        if isinstance(value, (Number, AnyNumber)):
            self.changes["numbers and booleans became text"] += 1
            value = str(value).lower() if isinstance(value, bool) else str(value)
        if not isinstance(value, str):
            raise BadRow(f"{where} must be text, found {_kind(value)}; make it one text")
        if not value.isascii() and _SURROGATE.search(value):
            raise BadRow(f"{where} has half of a surrogate pair, which is not text")
        if len(value) > LONGEST_BLANK and _BLANK.search(value):
            raise BadRow(f"{where} has {LONGEST_BLANK:,} blanks in a row, too many for the tokenizer")
        return tidy(value)

    def _split(self, value: Any, column: str) -> str | None:
        """The split that a row names. A column whose first value names none is about something else."""
        if value is None or value != value or value == "":
            return None
        split = split_of(value) if isinstance(value, str) else None
        if self.split_is_one is None:
            self.split_is_one = split is not None
        if not self.split_is_one:
            return None
        if split is None:
            raise BadRow(f"column {column!r} must be train, val or test, found {value!r:.60}", IGNORE_SPLIT)
        self.used[column] = None
        return split

    def _conversation(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Turn, ...]:
        """The turns of a list of messages; none where there is no such list, but a question with its answer."""
        if "messages" not in columns:
            return ()
        value, where = row[columns["messages"]], f"column {columns['messages']!r}"
        has_pair = columns.keys() >= NEEDED
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parse_json(value)
        if has_pair and not (isinstance(value, list) and value and type(value[0]) in (dict, str)):
            return ()
        if isinstance(value, BadRow) or not isinstance(value, list) and value not in (None, ""):
            raise BadRow(f"{where} must be a list of messages, found {_kind(value)}")
        system = self._text(row[columns["system"]], f"column {columns['system']!r}") if "system" in columns else ""
        turns = self._turns(value or [], where, system)
        if turns or not has_pair:
            self.used |= dict.fromkeys(columns[each] for each in ("messages", "system") if each in columns)
        return turns

    def _turns(self, messages: list[Any], where: str, system: str) -> tuple[Turn, ...]:
        """Questions with their answers, a system text in front. What one side says in several messages is one text;
        what stands before the first question and after the last answer cannot be trained on, and is left out."""
        turns: list[Turn] = []
        waiting = [system]  # what the next answer answers
        is_asked = False
        for speaker, text in self._messages(messages, where):
            if speaker != "assistant":
                if speaker == "user" or text != system:  # datasets may say it in both places
                    waiting.append(text)
                is_asked |= speaker == "user"
            elif not text:
                self.changes["empty answers left out"] += 1
            elif is_asked:
                turns.append(Turn(join_texts(*waiting), "", text))
                waiting, is_asked = [], False
            elif turns:
                turns[-1] = turns[-1]._replace(output=join_texts(turns[-1].output, text))
            else:
                self.changes["answers without a question left out"] += 1
        if is_asked:
            self.changes["questions without an answer left out"] += 1
        return tuple(turns)

    def _messages(self, items: list[Any], column: str) -> Iterator[tuple[str, str]]:
        """(user, assistant or system; its text) of every message."""
        for number, (item, side) in enumerate(zip(items, cycle(("user", "assistant"))), 1):
            where = f"{column}: message {number}"
            if isinstance(item, str):
                self.names["texts in turn"] = None
                yield side, self._text(item, where)
                continue
            if not isinstance(item, dict):
                raise BadRow(f"{where} must be an object with role and content, found {_kind(item)}")
            fields = {_plain(name): content for name, content in reversed(item.items()) if content is not None}
            if (role := fields.get("role", fields.get("from"))) is not None:
                if (speaker := SPEAKERS.get(_plain(role))) is None:
                    raise BadRow(f"{where}: role {role!r:.60} is none of user, assistant and system")
                self.names["messages" if "role" in fields else "ShareGPT"] = None
                if speaker == "assistant" and str(fields.get("weight")) in ("0", "0.0"):  # OpenAI: not to be trained
                    self.changes["answers of weight 0 left out"] += 1
                    continue
                content = next((fields[name] for name in ("content", "value", "text") if name in fields), None)
                yield speaker, self._content(content, where)
            elif (columns := self._columns(item)).keys() >= NEEDED:
                self.names["questions and answers in turn"] = None
                question = (columns[meaning] for meaning in PAIR if meaning in columns and meaning != "output")
                yield "user", join_texts(*(self._text(item[name], where) for name in question))
                yield "assistant", self._text(item[columns["output"]], where)
            else:
                raise BadRow(f"{where} has no role and content (found: {_names(item)})")

    def _content(self, content: Any, where: str) -> str:
        """The text of a message, which may come in parts."""
        if not isinstance(content, list):
            return self._text(content, where)
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                raise BadRow(f"{where} has a part that is no text: {part!r:.60}")
        return self._text("\n".join(part if isinstance(part, str) else part["text"] for part in content), where)

    @property
    def not_found(self) -> list[str]:
        """Columns that the user named and no row has."""
        found = {_plain(name) for name in chain.from_iterable(self.known)}
        return [name for name in self.columns.values() if name and _plain(name) not in found]

    def notes(self, turns: float) -> list[str]:
        """What was recognised, and what was changed. turns is their number in an example, on average."""
        rest = [name for name in dict.fromkeys(chain.from_iterable(self.known)) if name not in self.used]
        average = f", {turns:.1f} turns on average" if turns > 1 else ""
        used, ignored = (", ".join(map(str.strip, names)) or "none" for names in (self.used, rest))
        return [f"shape: {' and '.join(self.names)}{average}; columns used: {used}; ignored: {ignored}",
                *(f"{count:,} {change}" for change, count in self.changes.items())]


@cache
def _shape(*columns: str) -> str:
    """What a question and its answer in these columns are called."""
    shape = "/".join(map(_plain, columns))
    return KNOWN_PAIRS.get(shape, shape)


def _plain(name: object) -> str:
    return str(name).strip().lower()


def _names(row: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.60}" for name in row) or "none"


def _kind(value: object) -> str:
    if isinstance(value, BadRow):
        return f"text that {value}"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (Number, AnyNumber)) else type(value).__name__)
