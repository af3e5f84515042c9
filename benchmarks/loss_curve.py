"""Draw the loss of a run from its TensorBoard log: train/loss as a line, val/loss as points.

    python benchmarks/loss_curve.py [--runs demo/runs] [--output docs/demo_loss.png]

Needs matplotlib. Of several runs in the folder the newest is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import ROOT
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "demo" / "runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "demo_loss.png")
    options = parser.parse_args()
    runs = sorted(path.parent for path in options.runs.rglob("events.out.tfevents.*"))
    if not runs:
        raise SystemExit(f"{options.runs}: no TensorBoard log there")
    log = EventAccumulator(str(runs[-1]), size_guidance={"scalars": 0})  # 0: all of them
    log.Reload()
    figure, axis = pyplot.subplots(figsize=(7, 3.5), constrained_layout=True)
    for tag, style in (("train/loss", "-"), ("val/loss", "o")):
        points = log.Scalars(tag)
        axis.plot([point.step for point in points], [point.value for point in points], style, label=tag,
                  clip_on=False)
    axis.set(xlabel="step", ylabel="loss, nats a response token", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
