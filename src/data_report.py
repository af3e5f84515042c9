"""What data preparation tells: counts, lengths, a histogram, and samples with the trained part marked."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cli import printable

PERCENTILES = (50, 90, 95, 99, 100)
SAMPLES = 3
SAMPLE_CHARACTERS = 600


class Report:
    """Collects lengths as counts, so its memory does not grow with the number of examples."""

    def __init__(self) -> None:
        self.lengths: dict[str, Counter[int]] = {"prompt": Counter(), "response": Counter(), "total": Counter()}
        self.samples: list[Any] = []

    def add(self, example: Any) -> None:
        total = len(example.tokens)
        self.lengths["prompt"][example.prompt_tokens] += 1
        self.lengths["response"][total - example.prompt_tokens] += 1
        self.lengths["total"][total] += 1
        if len(self.samples) < SAMPLES:
            self.samples.append(example)

    def show(self, manifest: dict[str, Any]) -> None:
        kept = manifest["train_examples"] + manifest["val_examples"]
        tokens = manifest["train_tokens"] + manifest["val_tokens"]
        response = manifest["train_response_tokens"] + manifest["val_response_tokens"]
        dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in manifest["dropped"].items())
        print(f"examples   {manifest['total_examples']:,} read, {kept:,} kept; dropped: {dropped}")
        for split in ("train", "val"):
            print(f"{split:<11}{manifest[split + '_examples']:,} examples, {manifest[split + '_tokens']:,} tokens")
        print(f"trained on {100 * response / tokens:.1f} % of the tokens (responses)\n")
        print("tokens an example" + "".join(f"{'max' if p == 100 else f'p{p}':>7}" for p in PERCENTILES))
        for name, counts in self.lengths.items():
            print(f"{name:<17}" + "".join(f"{percentile(counts, p):>7}" for p in PERCENTILES))
        print()
        print("\n".join(histogram(self.lengths["total"])))
        for number, example in enumerate(self.samples, 1):
            print(f"\nsample {number}, the trained part between >>> and <<<")
            print(marked_sample(example))


def percentile(counts: Counter[int], percent: int) -> int:
    """The smallest length that at least percent % of the examples do not exceed (nearest rank)."""
    wanted = -(-counts.total() * percent // 100)
    for length in sorted(counts):
        wanted -= counts[length]
        if wanted <= 0:
            return length
    return 0


def histogram(counts: Counter[int], bins: int = 10, width: int = 50) -> list[str]:
    """One line a bin of equal width: the range of lengths, the number of examples, a bar."""
    size = -(-(max(counts) + 1) // bins)
    heights = Counter({length // size: 0 for length in counts})
    for length, count in counts.items():
        heights[length // size] += count
    most = max(heights.values())
    return [f"{bin * size:>6} - {bin * size + size - 1:<6}{heights[bin]:>9} {'#' * -(-width * heights[bin] // most)}"
            for bin in range(max(heights) + 1)]


def marked_sample(example: Any) -> str:
    """The decoded example, its trained part between >>> and <<<; long parts are cut in the middle."""
    from instruct_format import tokenizer

    prompt, response = (tokenizer().decode(part.tolist())
                        for part in (example.tokens[:example.prompt_tokens], example.tokens[example.prompt_tokens:]))
    return printable(f"{_shortened(prompt)}>>>{_shortened(response)}<<<")


def _shortened(text: str) -> str:
    half = SAMPLE_CHARACTERS // 2
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
