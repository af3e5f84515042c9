"""What a run has, and what of it a checkpoint holds."""

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloader_instruct import ExampleStream, InstructData, Position
from instruct_format import TEMPLATE
from training.ending import Signals
from training.options import ON_RESUME
from training.processes import Processes
from training.progress import Progress
from training.step import HIGHEST_SCALE, Learner
from training.threads import Saver


@dataclass
class Run:
    """Everything a run has. The fields from step to val_losses are what a checkpoint adds to model and optimizer."""

    options: Namespace
    processes: Processes
    signals: Signals
    folder: Path
    manifest: dict[str, Any]  # of the prepared data
    data: dict[str, InstructData]
    stream: ExampleStream
    learner: Learner
    name: str
    step: int = 0
    position: Position = Position()
    skipped: int = 0  # non-finite steps in a row, up to now
    val_losses: list[list[float]] = field(default_factory=list)  # [step, loss]
    saved: Path | None = None  # the file that was saved last, or that the run was resumed from
    is_saved: bool = True  # whether that file holds the run as it is now; a run of no steps has nothing to save
    best_loss: float = math.inf  # the lowest val loss: of this run, and of what it went back from
    has_best: bool = True  # whether best_model.pt holds the weights of the lowest val loss
    progress: Progress | None = None  # on the main process only
    saver: Saver = field(default_factory=lambda: Saver(is_later=False))

    def best(self) -> list[float] | None:
        """[step, loss] of the lowest val loss since training began: step 0 is what the model was before."""
        found = [entry for entry in self.val_losses if entry[0] and math.isfinite(entry[1])]
        return min(found, key=lambda entry: entry[1], default=None)

    def evaluations_in_vain(self) -> int:
        """How many evaluations there were since the lowest val loss."""
        losses = [loss for _, loss in self.val_losses]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        options = {name: self.options.asked.get(name, getattr(self.options, name)) for name in ON_RESUME}
        is_scaled = str(self.learner.product_type) == "torch.float16"  # else it is 1, not for fp16 to begin with
        return {"step": self.step, "position": [self.position.epoch, self.position.index], "skipped": self.skipped,
                "val_losses": self.val_losses, "name": self.name, "options": options, "template": TEMPLATE,
                "multi_turn": self.manifest.get("multi_turn", False), "data_source": self.manifest["source"],
                "data_fingerprint": self.manifest["fingerprint"], "model_config": vars(self.learner.model.config),
                "loss_scale": self.learner.loss_scale if is_scaled else HIGHEST_SCALE,
                "model": self.learner.model.state_dict(), "optimizer": self.learner.optimizer.state_dict()}
