"""The instruction template and the GPT-2 tokenizer: the only place that knows the text around a question.

Data preparation and chat both call it, so the prompt a model was trained on is the prompt it is asked with.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import tiktoken

from cli import UserError

TEMPLATE = "instruction-input-response/1"  # travels in the data manifest and in every checkpoint
TOKENIZER = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
_RANKS = Path(__file__).parent / "gpt2_ranks"  # tiktoken's own cache file for r50k_base: gpt2's ranks and pattern


@cache
def tokenizer() -> tiktoken.Encoding:
    """The GPT-2 tokenizer, from the ranks that ship with the project; tiktoken checks their SHA-256.

    Raises UserError when that file is missing or damaged.
    """
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(_RANKS)
    try:
        return tiktoken.get_encoding("r50k_base")
    except Exception as error:  # tiktoken drops a damaged file and tries the network, which fails in many ways
        raise UserError(f"{_RANKS}: the tokenizer's ranks are missing or damaged; "
                        "restore them with: git checkout -- src/gpt2_ranks") from error
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def prompt_text(instruction: str, input: str = "") -> str:
    """The text up to and including the line that asks for the response. The Input block is left out when empty."""
    text = f"### Instruction:\n{instruction.strip()}\n\n"
    if input.strip():
        text += f"### Input:\n{input.strip()}\n\n"
    return text + "### Response:\n"


def encode_prompt(instruction: str, input: str = "") -> list[int]:
    """Token ids of the prompt. <|endoftext|> inside a field is encoded as plain text."""
    return tokenizer().encode_ordinary(prompt_text(instruction, input))


def encode_example(instruction: str, input: str, output: str) -> tuple[list[int], list[int]]:
    """Tokens and loss mask of one training example, of equal length.

    The mask is 1 on the response and on the <|endoftext|> that ends it, 0 on the prompt. Prompt and response are
    encoded apart, so the prompt's tokens do not depend on the response.
    """
    prompt = encode_prompt(instruction, input)
    response = [*tokenizer().encode_ordinary(output.strip()), END_OF_TEXT]
    return prompt + response, [0] * len(prompt) + [1] * len(response)
