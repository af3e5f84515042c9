"""What a row means: its columns, known by the names that people give them, become the turns of an Example.

A row is a question with its answer (instruction, output, perhaps input), or a conversation: a list of messages with
roles, of questions with their answers, or of texts in turn.
"""

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from numbers import Number as AnyNumber
from typing import Any, NamedTuple

from data.rows import Source
from data.values import MESSAGES_TOO, NAMES, ROLES, BadRow, BadSplit, Number, is_talk, parse_list, plain, split_of
from instruct_format import END, join_texts, tidy, with_input

SYSTEMS = ("system", "systeminstruction", "system_instruction")  # beside messages
PAIR = ("instruction", "input", "output", "system")  # the meanings that make a question and its answer
NEEDED = {"instruction", "output"}
KNOWN_PAIRS = {"instruction/output": "Alpaca", "instruction/input/output": "Alpaca",
               "instruction/context/response": "Dolly", "question/response/system_prompt": "OpenOrca"}
SPEAKERS = {**dict.fromkeys(("user", "human", "prompter"), "user"),
            **dict.fromkeys(("system", "developer"), "system"),
            **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant")}
TEXTS = ("content", "value", "text", "parts", "message")  # what a message says
CALLS = ("tool_calls", "function_call")  # which may stand in its place
UNTRAINED = ("0", "0.0", "false")  # values of an answer's weight
_WHICH = ("say which it is: --columns instruction=NAME output=NAME, or messages=NAME. The first line of a table, and "
          "each row of JSON, has to name its columns. Where texts are whole conversations, take a variant of the data "
          "with messages or pairs, such as philschmid/guanaco-sharegpt-style")
LONGEST_BLANK = 100_000  # the tokenizer fails from about a million blanks in a row on
_BLANK, _SURROGATE = re.compile(rf"\s{{{LONGEST_BLANK}}}"), re.compile("[\ud800-\udfff]")


class Turn(NamedTuple):
    """A question and its answer, tidy."""

    instruction: str
    input: str
    output: str
    is_trained: bool = True  # else later turns see it only


class Example(NamedTuple):
    """One checked row. split is None unless the row says where it belongs: train, val or test."""

    turns: tuple[Turn, ...]  # a system text is part of the first instruction
    split: str | None = None

    @property
    def fault(self) -> str:
        """Why it cannot be trained on: empty_output, empty_question; or nothing."""
        if not any(turn.output for turn in self.turns):
            return "empty_output"
        return "" if any(turn.instruction or turn.input for turn in self.turns) else "empty_question"


class Shapes:
    """Reads rows as examples, and notes what a user wants to know of that: shapes, columns, what was changed."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns  # as the user says: the column of instruction, output and so on; "" for none
        self.not_found = [name for name in columns.values() if name]  # columns that the user names and no row has yet
        self.known: dict[tuple[str, ...], dict[str, str]] = {}  # names of columns -> which has which meaning
        self.names: dict[str, None] = {}  # of the shapes found
        self.used: dict[str, None] = {}  # columns
        self.changes: Counter[str] = Counter()
        self.split_is_one: bool | None = None  # whether the first value in the column split is the name of one

    def examples(self, sources: Iterable[Source]) -> Iterator[tuple[str, Example | BadRow]]:
        """Yield (place, example or what is wrong with the row) for every row."""
        for source in sources:
            for number, (place, row) in enumerate(source.rows):
                try:
                    yield f"{source.name}: {place}", self.example(row)
                except BadRow as bad:
                    if number == 0 and type(bad) is BadRow:  # others may be like it: to drop them all is no advice
                        bad.advice = ""
                    yield f"{source.name}: {place}", bad

    def example(self, row: Any) -> Example:
        """Raises BadRow where there is no meaning in the row, or no text where one must be."""
        if isinstance(row, BadRow):
            raise row
        if is_talk(row):
            row = {"messages": row}
        if not isinstance(row, dict):
            raise BadRow(f"expected an object with columns such as instruction and output, found {_shown(row)}")
        columns = self.known.get(tuple(row))
        if columns is None:
            columns = self.known[tuple(row)] = self._columns(row)
        split = self._split(row[columns["split"]], columns["split"]) if "split" in columns else None
        if columns.keys() >= NEEDED and any(is_talk(row[columns[meaning]]) for meaning in NEEDED) and not (
                self.columns.get("messages") or "input" in columns and row[columns["input"]]):
            row, columns = self._joined(row, columns)
        turns = self._conversation(row, columns) if "messages" in columns else ()
        if "messages" not in columns or columns.keys() >= NEEDED and Example(turns).fault:
            return Example((self._pair(row, columns),), split)
        self.used |= dict.fromkeys(columns[meaning] for meaning in ("messages", "system") if meaning in columns)
        return Example(turns, split)

    def _columns(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The column of each meaning: as the user says, else by their names."""
        free = {plain(name): name for name in reversed(list(row))}
        self.not_found = [name for name in self.not_found if plain(name) not in free]
        found: dict[str, str | None] = {meaning: (name if name in row else free.get(plain(name))) if name else None
                                        for meaning, name in self.columns.items()}
        if "instruction" in found or "output" in found:
            found.setdefault("messages")
        for meaning, names in NAMES.items():
            found.setdefault(meaning, next((free[name] for name in names if name in free
                                            and free[name] not in found.values()), None))
        if None in (found["instruction"], found["output"]) and "messages" not in self.columns:
            others = (name for name in MESSAGES_TOO if name in free)
            found["messages"] = found["messages"] or next(
                (free[name] for name in others if name != "contents" or is_talk(row[free[name]])), None)  # as Gemini's
        if found["messages"] and "system" not in self.columns:
            found["system"] = found["system"] or next((free[name] for name in SYSTEMS if name in free), None)
        return {meaning: name for meaning, name in found.items() if name is not None}

    def _pair(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Turn:
        """The turn of a question and its answer."""
        if missing := [meaning for meaning in PAIR if meaning in NEEDED - columns.keys()]:
            named = (repr(name) if (name := self.columns.get(meaning)) else f"for the {meaning}" for meaning in missing)
            raise BadRow(f"no column {' and no column '.join(named)} (found: {_names(row)}); {_WHICH}")
        instruction, input, output, system = self._texts(row, columns)
        used = [columns[meaning] for meaning in PAIR if meaning in columns]
        self.used |= dict.fromkeys(used)
        shape = "/".join(map(plain, used))
        self.names[KNOWN_PAIRS.get(shape, shape)] = None
        return Turn(join_texts(system if instruction or input else "", instruction), input, output)

    def _texts(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str = "") -> list[str]:
        """Instruction, input, output and system text, empty where there is no such column."""
        return [self._text(row[columns[meaning]], f"{where}column {columns[meaning]!r}") if meaning in columns else ""
                for meaning in PAIR]

    def _text(self, value: Any, where: str) -> str:
        """A value as text. Null and NaN are empty, numbers and booleans what JSON writes, a list of one text is it."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            [value] = value
        if value is None or value != value or value in ([], {}):
            return ""
        if isinstance(value, (Number, AnyNumber)):
            self.changes["numbers and booleans became text"] += 1
            value = str(value).lower() if isinstance(value, bool) else str(value)
        if not isinstance(value, str):
            raise BadRow(f"{where} must be text, found {_shown(value)}; make it one text, or take "
                         "others: --columns instruction=NAME output=NAME, or messages=NAME")
        if not value.isascii() and _SURROGATE.search(value):
            raise BadRow(f"{where} has half of a surrogate pair, which is not text")
        if len(value) > LONGEST_BLANK and _BLANK.search(value):
            raise BadRow(f"{where} has {LONGEST_BLANK:,} blanks in a row, too many for the tokenizer")
        self.changes[f"texts contain {END}, which is trained as text and ends nothing: remove it"] += END in value
        return tidy(value)

    def _split(self, value: Any, column: str) -> str | None:
        """The split that a row names. A column whose first value names none is about something else."""
        if value in (None, "") or value != value:
            return None
        split = split_of(value) if isinstance(value, str) else None
        if self.split_is_one is None:
            self.split_is_one = split is not None or "split" in self.columns
        if not self.split_is_one:
            return None
        if split is None:
            raise BadSplit(f"column {column!r} must be train, val or test, found {_shown(value)}")
        self.used[column] = None
        return split

    def _joined(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The conversation of a question and an answer of which one is a list of messages, or both; and its columns."""
        messages: list[Any] = []
        for meaning, role in (("instruction", "user"), ("output", "assistant")):
            self.used[columns[meaning]] = None
            value = row[columns[meaning]]
            messages += value if is_talk(value) else [{"role": role, "content": value}]
        roles = [plain(said) for name, said in value[0].items() if plain(name) in ROLES] if is_talk(value) else []
        if roles and SPEAKERS.get(roles[0]) != "assistant":  # the answer holds the question too
            messages = value
        others = {meaning: name for meaning, name in columns.items() if meaning in ("system", "split")}
        return {**row, columns["instruction"]: messages}, {**others, "messages": columns["instruction"]}

    def _conversation(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Turn, ...]:
        """The turns of a list of messages; none where there is no such list, but a question with its answer."""
        value, where = row[columns["messages"]], f"column {columns['messages']!r}"
        value = parse_list(value) if isinstance(value, str) else value
        if columns.keys() >= NEEDED and not (isinstance(value, list) and value and type(value[0]) in (dict, str)):
            return ()
        if not isinstance(value, list) and value not in (None, ""):
            advice = f"the columns are {_names(row)}; {_WHICH}"
            if str(value).startswith("["):
                advice = "write it as JSON, or save the data as .jsonl or .parquet"
            raise BadRow(f"{where} must be a list of messages, found {_shown(value)}; {advice}")
        return self._turns(value or [], where, self._system(row, columns.get("system")))

    def _system(self, row: Mapping[str, Any], column: str | None) -> str:
        """The system text beside messages. What is no text where only its name says so is about something else."""
        value = row[column] if column else None
        is_text = isinstance(value, (str, list)) or isinstance(value, dict) and "parts" in value
        is_other = not is_text and plain(column) in SYSTEMS and "system" not in self.columns
        return "" if is_other else self._content(value, f"column {column!r}")

    def _turns(self, messages: list[Any], where: str, system: str) -> tuple[Turn, ...]:
        """Questions with their answers, a system text in front. What one side says in several messages is one text;
        questions and answers without the other are left out, and so is what no trained answer comes after."""
        turns, orphans = list[Turn](), list[Turn]()  # the second: answers without a question
        waiting = [("system", system)]  # what the next answer answers, and answers that are empty
        for speaker, text, is_trained in self._messages(messages, where):
            users = [said for who, said in waiting if who == "user"]
            if speaker == "user" and ("assistant", "") in waiting:
                waiting = [each for each in waiting if each[0] == "system"]
                self.changes["empty answers left out with their questions"] += bool(users)
            if speaker != "assistant" or not text:
                if (speaker, text) != ("system", system):  # datasets may say it in both places
                    waiting.append((speaker, text))
            elif any(users):
                turns.append(Turn(join_texts(*(said for _, said in waiting)), "", text, is_trained))
                waiting = []
            elif turns and not users:
                turns[-1] = Turn(turns[-1].instruction, "", join_texts(turns[-1].output, text),
                                 turns[-1].is_trained and is_trained)
            else:
                self.changes["answers without a question left out"] += 1
                orphans.append(Turn("", "", text, is_trained))
        if any(said for who, said in waiting if who == "user"):
            self.changes["questions without an answer left out"] += 1
        while turns and not turns[-1].is_trained:
            turns.pop()
        return tuple(turns or orphans)

    def _messages(self, items: list[Any], column: str) -> Iterator[tuple[str, str, bool]]:
        """(user, assistant or system; its text; whether it may be trained) of every message."""
        if all(isinstance(item, list) and len(item) == 2 for item in items):  # pairs, as Gradio has them
            items = [*chain.from_iterable(items)]
        for number, item in enumerate(items, 1):
            where = f"{column}: message {number}"
            if isinstance(item, str):
                self.names["texts in turn"] = None
                yield ("assistant", "user")[number % 2], self._text(item, where), True
                continue
            if not isinstance(item, dict):
                raise BadRow(f"{where} must be an object with role and content, found {_shown(item)}")
            fields = {plain(name): value for name, value in reversed(item.items())}
            role = next(filter(None, map(fields.get, ROLES)), None)
            if role and (len(fields) == 1 or fields.keys() & {*TEXTS, *CALLS}):  # else its text has another name
                if (speaker := SPEAKERS.get(plain(role))) is None:
                    raise BadRow(f"{where}: role {_shown(role)} is none of user, assistant and system; rename it, or "
                                 "leave it out if it is neither")
                self.names["ShareGPT" if fields.get("from") and not fields.get("role") else "messages"] = None
                # as OpenAI and axolotl say that an answer is context only
                is_trained = {plain(fields.get(name)) for name in ("weight", "train")}.isdisjoint(UNTRAINED)
                self.changes["answers of weight 0 are context only"] += speaker == "assistant" and not is_trained
                text = next((said for said in map(fields.get, TEXTS) if said not in (None, "")), None)
                input = fields.get("input") if speaker == "user" else None  # as the chat template takes it
                yield speaker, with_input(self._content(text, where), self._content(input, where)), is_trained
            elif (columns := self._columns(item)).keys() >= NEEDED:
                self.names["questions and answers in turn"] = None
                instruction, input, output, system = self._texts(item, columns, f"{where}: ")
                yield "user", join_texts(system, with_input(instruction, input)), True
                yield "assistant", output, True
            else:
                raise BadRow(f"{where} has no role and content (found: {_names(item)})")

    def _content(self, content: Any, where: str) -> str:
        """The text of a message, which may come in parts."""
        if isinstance(content, dict):
            content = content.get("parts", content)
        if isinstance(content, list):
            texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
            for part, text in zip(content, texts):
                if not isinstance(text, str):
                    raise BadRow(f"{where} has a part that is no text: {_shown(part)}")
            content = "\n".join(texts)
        return self._text(content, where)

    def notes(self, turns: float) -> list[str]:
        """What was recognised, and what was changed. turns is their number in an example, on average."""
        rest = [name for name in dict.fromkeys(chain.from_iterable(self.known)) if name not in self.used]
        average = f", {turns:.1f} turns on average" if turns > 1 else ""
        used, ignored = (", ".join(map(str.strip, names)) or "none" for names in (self.used, rest))
        return [f"shape: {' and '.join(self.names)}{average}; columns used: {used}; ignored: {ignored}",
                *(f"{count:,} {change}" for change, count in self.changes.items() if count)]


def _names(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for an error: at most 20 of them."""
    return ", ".join(f"{name!r:.60}" for name in islice(row, 20)) + ", ..." * (len(row) > 20) or "none"


def _shown(value: object) -> str:
    """A value of a row, for an error."""
    return f"{reprlib.repr(value):.60}"
