"""Where a run stands."""

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Progress", "StepPosition"]


@dataclass(frozen=True)
class StepPosition:
    """Where in a run a forward happens; its randomness follows from ``derive_seed(seed, "step", *position)``.

    Attributes:
        step: the optimiser step under way, counted from 1.
        position: (epoch, forward in the epoch, process).
    """

    step: int
    position: tuple[int, int, int]


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
        best_score: best held-out score so far (of classification Acc@1, in percent); -1 before the first evaluation.
        shift: steps that `step` lacks to what it would be had all epochs had the present number of steps; not 0 once
            images came or went.
    """

    steps_per_epoch: int
    global_batch: int
    step: int = 0
    finished_epochs: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    shift: int = 0

    @property
    def place(self) -> int:
        """Where in the run it stands, in steps of epochs of the present length: what the schedule goes by."""
        return self.step + self.shift

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.place // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Optimiser steps done in the epoch under way."""
        return self.place % self.steps_per_epoch

    def stretch(self, steps_per_epoch: int) -> None:
        """Stay in the same place of the run while an epoch becomes one of another number of steps."""
        inside = self.step_in_epoch * steps_per_epoch // self.steps_per_epoch
        self.shift = self.epoch * steps_per_epoch + inside - self.step
        self.steps_per_epoch = steps_per_epoch

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
            if field.name != "shift" or "shift" in state:  # earlier versions knew no shift
                setattr(self, field.name, state[field.name])
