"""What data preparation shows: counts, lengths, a histogram, and samples with the trained parts marked."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli import printable, printable_line
from data.shards import SPLITS, Document
from instruct_format import tokenizer, trained_spans

SAMPLES = 3
SAMPLE_CHARACTERS = 600


class Report:
    """Collects the lengths of all examples, and the first of them as samples."""

    def __init__(self) -> None:
        self.responses, self.totals = array("I"), array("I")  # tokens of each example
        self.samples: list[Document] = []

    def add(self, document: Document) -> None:
        self.responses.append(int(document.loss_mask.sum()))
        self.totals.append(len(document.tokens))
        if len(self.samples) < SAMPLES:
            self.samples.append(document)

    def show(self, manifest: dict[str, Any], notes: list[str]) -> None:
        responses, totals = np.array(self.responses), np.array(self.totals)
        print(*map(printable_line, notes), sep="\n")
        print(f"examples   {counts(len(totals), manifest['dropped'])}")
        for split in SPLITS:
            print(f"{split:<11}{manifest[split + '_examples']:,} examples, {manifest[split + '_tokens']:,} tokens")
        print(f"trained on {100 * responses.sum() / totals.sum():.1f} % of the tokens (responses)\n")
        print("tokens an example    p50    p90    p95    p99    max")
        for name, lengths in {"prompt": totals - responses, "response": responses, "total": totals}.items():
            longest = np.percentile(lengths, (50, 90, 95, 99, 100), method="inverted_cdf")  # the nearest rank
            print(f"{name:<17}" + "".join(f"{length:>7}" for length in longest))
        print("\n" + "\n".join(histogram(totals)))
        for number, document in enumerate(self.samples, 1):
            print(f"\nsample {number}, the trained part between >>> and <<<")
            print(marked_sample(document))


def counts(kept: int, dropped: Mapping[str, int]) -> str:
    """How many examples were read and kept, and why the others were dropped."""
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items())
    return f"{kept + sum(dropped.values()):,} read, {kept:,} kept; dropped: {reasons}"


def histogram(lengths: np.ndarray, bins: int = 10, width: int = 50) -> list[str]:
    """One line a bin of equal width: the range of lengths, the number of examples, a bar."""
    size = -(-(int(lengths.max()) + 1) // bins)
    heights = np.bincount(lengths // size)
    return [f"{bin * size:>6} - {bin * size + size - 1:<6}{height:>9} {'#' * -(-width * height // heights.max())}"
            for bin, height in enumerate(heights)]


def marked_sample(document: Document) -> str:
    """The decoded example, each trained part between >>> and <<<; long parts are cut in the middle."""
    text, end = "", 0
    for start, stop in trained_spans(document.loss_mask):
        prompt, response = (_shortened(tokenizer().decode(part.tolist()))
                            for part in (document.tokens[end:start], document.tokens[start:stop]))
        text, end = f"{text}{prompt}>>>{response}<<<", stop
    return printable(text)


def _shortened(text: str) -> str:
    half = SAMPLE_CHARACTERS // 2
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
