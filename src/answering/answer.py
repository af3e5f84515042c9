"""From a question to the text of its answer, piece by piece: the prompt of training, whole characters, why it ended."""

import codecs
import time
from collections.abc import Callable, Iterator

import torch

from answering.generate import generate
from answering.settings import Settings
from errors import UserError
from instruct_format import END_OF_TEXT, encode_prompt, tokenizer
from model import GPT

LONGEST_TOKEN = 128  # characters: a longer question than this times the context need not be tokenized


class Answer:
    """The answer to one question, complete once its pieces were all taken.

    Raises UserError when the question does not fit the model's context.
    """

    def __init__(self, model: GPT, question: str, input: str, settings: Settings,
                 generator: torch.Generator | None = None) -> None:
        self.model, self.question, self.input, self.settings, self.generator = (
            model, question, input, settings, generator)
        self.text = ""
        self.tokens = 0
        self.seconds = 0.0
        self.stopped = "length"  # length, end (the model was done) or interrupt
        context_length = model.config.context_length
        hopeless = len(question) + len(input) > LONGEST_TOKEN * context_length
        self.prompt = [] if hopeless else encode_prompt(question, input)
        if hopeless or len(self.prompt) >= context_length:
            raise UserError(f"the question has {len(self.prompt) or 'far more'} tokens, too many for a context of "
                            f"{context_length}; shorten it")

    def pieces(self, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The text as the model gives it, in whole characters; after a piece it may be stopped."""
        begin = time.perf_counter()
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        limit = min(self.settings.max_new_tokens, self.model.config.context_length - len(self.prompt))
        for token in generate(self.model, self.prompt, limit, self.settings, END_OF_TEXT, self.generator):
            self.tokens += 1
            piece = utf8.decode(tokenizer().decode_single_token_bytes(token))
            self.text += piece
            yield piece
            if is_stopped():
                self.stopped = "interrupt"
                break
        else:
            self.stopped = "length" if self.tokens == limit else "end"
        last = utf8.decode(b"", final=True)
        self.text += last
        yield last
        self.seconds = time.perf_counter() - begin
