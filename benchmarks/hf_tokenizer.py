"""GPT-2's tokenizer as the programs beside ours want it, from the ranks of the project: no download."""

from __future__ import annotations

import common  # noqa: F401  (finds src/)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from instruct_format import tokenizer


def as_hugging_face() -> GPT2TokenizerFast:
    """GPT-2's tokenizer for transformers, from the ranks of the project (no download)."""
    letters = bytes_to_unicode()
    ranks = tokenizer()._mergeable_ranks
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                _, at = min((ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
                parts[at:at + 2] = [parts[at] + parts[at + 1]]
            merges.append(tuple("".join(letters[byte] for byte in part) for part in parts))
    vocabulary["<|endoftext|>"] = 50256
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return GPT2TokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
