"""Where a run stands."""

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Progress"]


@dataclass
class Progress:
    """Counters of a run, saved in every checkpoint.

    Everything random and the learning rate are functions of these counters, so they are what a resumed run
    continues from.

    Attributes:
        steps_per_epoch: optimiser steps in one epoch.
        global_batch: images per optimiser step, all processes and accumulation steps together.
        step: optimiser steps done.
        finished_epochs: epochs trained, and evaluated where that was due.
        skipped: steps left out because their loss was not finite.
        seconds: time spent, over all the times that the run was started.
        best_score: best held-out Acc@1 so far, in percent; -1 before the first evaluation.
    """

    steps_per_epoch: int
    global_batch: int
    step: int = 0
    finished_epochs: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best_score: float = -1.0

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Optimiser steps done in the epoch under way."""
        return self.step % self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """All counters, as JSON holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved counters.

        Raises:
            ValueError: the steps of the saved run are of another size.
        """
        for name in ("global_batch", "steps_per_epoch"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"it was trained with {name} {state[name]}, this run has {getattr(self, name)} "
                    "(train.batch_size x processes x train.accumulation_steps and the training set must "
                    "stay the same)"
                )
        for field in fields(self):
            setattr(self, field.name, state[field.name])
