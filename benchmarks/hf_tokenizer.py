"""GPT-2's tokenizer as the programs beside ours want it, from the ranks of the project: no download."""

from __future__ import annotations

import tempfile
from pathlib import Path

import common  # noqa: F401  (finds src/)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weights.export import tokenizer_files


def as_hugging_face() -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(context_length=1024).items():
            (Path(folder) / name).write_text(text)
        return AutoTokenizer.from_pretrained(folder, tokenizer_class="GPT2TokenizerFast")
