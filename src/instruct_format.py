"""The instruction template and the GPT-2 tokenizer: the only place that knows the text around a question.

Data preparation and chat both call it, so the prompt a model was trained on is the prompt it is asked with.
"""

import hashlib
import re
from base64 import b64decode
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from errors import UserError

TEMPLATE = "instruction-input-response/1"  # travels in the data manifest and in every checkpoint
TOKENIZER = "gpt2"
END, END_OF_TEXT = "<|endoftext|>", 50256
VOCAB_SIZE = 50257
_RANKS = Path(__file__).parent / "gpt2_ranks" / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"  # see README.txt beside it
_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@cache
def tokenizer() -> tiktoken.Encoding:
    """The GPT-2 tokenizer, from the ranks that ship with the project. Raises UserError when these are damaged."""
    data = _RANKS.read_bytes() if _RANKS.exists() else b""
    if hashlib.sha256(data).hexdigest() != _RANKS_SHA256:
        raise UserError(f"{_RANKS}: the tokenizer's ranks are missing or damaged; "
                        "restore them with: git checkout -- src/gpt2_ranks")
    ranks = {b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
    return tiktoken.Encoding(TOKENIZER, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={END: END_OF_TEXT})


def tidy(text: str) -> str:
    """A field without the blank lines around it and blanks at its end, but with its indentation. CR LF is a newline."""
    text = re.sub("(?<!\r)\r+\n", "\n", text) if "\r" in text else text  # doing it again changes nothing
    first_line = text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1
    return text[first_line:].rstrip()


def join_texts(*texts: str) -> str:
    """Pieces of one side, such as a system text and the first instruction, with a blank line between."""
    return "\n\n".join(filter(None, map(tidy, texts)))


def with_input(instruction: str, input: str) -> str:
    """A question, not an empty one, and its input as one text, of which prompt_text makes what it makes of both."""
    return tidy(instruction) + (f"\n\n### Input:\n{text}" if (text := tidy(input)) else "")


def prompt_text(instruction: str, input: str = "") -> str:
    """The text up to and including the line that asks for the response. The Input block is left out when empty."""
    return f"### Instruction:\n{with_input(instruction, input)}\n\n### Response:\n"


def encode_prompt(instruction: str, input: str = "") -> list[int]:
    """Token ids of the prompt. <|endoftext|> inside a field is encoded as plain text."""
    return tokenizer().encode_ordinary(prompt_text(instruction, input))


def encode_example(instruction: str, input: str, output: str, is_trained: bool = True) -> tuple[list[int], list[int]]:
    """Tokens and loss mask of a question and its answer: 1 on the response and the <|endoftext|> that ends it, if it is
    trained, else 0. Prompt and response are encoded apart, so the prompt's tokens do not depend on the response."""
    prompt = encode_prompt(instruction, input)
    response = [*tokenizer().encode_ordinary(tidy(output)), END_OF_TEXT]
    return prompt + response, [0] * len(prompt) + [int(is_trained)] * len(response)


def encode_conversation(turns: Iterable[tuple[str, str, str] | tuple[str, str, str, bool]]) -> tuple[
        list[int], list[int]]:
    """Tokens and loss mask of turns, each what encode_example takes: one example after another, in one document."""
    tokens, mask = zip(*(encode_example(*turn) for turn in turns))
    return list(chain.from_iterable(tokens)), list(chain.from_iterable(mask))


def trained_spans(loss_mask: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of ones in a loss mask: the responses. What stands before a span is its prompt."""
    edges = np.flatnonzero(np.diff(np.asarray(loss_mask, dtype=np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2]))
