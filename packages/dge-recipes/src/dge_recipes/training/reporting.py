"""What a run tells while it trains: progress bar, ``metrics.jsonl`` and experiment trackers."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dge_recipes.errors import UserError
from dge_recipes.training.losses import LOSS_NAMES
from dge_recipes.training.progress import Progress

__all__ = ["Averages", "Reporter"]


class Averages:
    """Means of the loss module's numbers since the last report, kept on the device until they are asked for.

    Args:
        device: where the numbers arrive.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(LOSS_NAMES), device=device)
        self._count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add one forward's scalars; no synchronisation with the device."""
        self._sums += torch.stack([losses[name].detach().float() for name in LOSS_NAMES])
        self._count += 1

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last call; every process must call it."""
        means = accelerator.reduce(self._sums / max(1, self._count), reduction="mean")
        self._sums = torch.zeros_like(self._sums)
        self._count = 0
        return dict(zip(LOSS_NAMES, means.tolist(), strict=True))


class Reporter:
    """Writes the records of a run; silent in all processes but the main one.

    Args:
        accelerator: of this run; its trackers must be initialised.
        progress: of this run.
        total_steps: optimiser steps of the whole run.
        metrics: the JSON-lines file, appended to.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, total_steps: int, metrics: Path) -> None:
        self._accelerator, self._progress, self._metrics = accelerator, progress, metrics
        self._total = total_steps
        self._main = accelerator.is_main_process
        self._bar = tqdm(
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._main and sys.stderr.isatty()),
        )
        self._first_step, self._start = 0, time.perf_counter()

    def resume(self, step: int) -> None:
        """The run stands at this step already."""
        self._first_step, self._start = step, time.perf_counter()
        self._bar.update(step - self._bar.n)

    def step(self) -> None:
        """One optimiser step is done."""
        self._bar.update(1)

    def training(self, means: dict[str, float], lr: float, images_per_second: float) -> None:
        """Record means since the last report."""
        self._record("train", {**means, "lr": lr, "images_per_second": images_per_second})
        shown = {
            "loss": f"{means['loss']:.3f}",
            "acc": f"{means['accuracy']:.3f}",
            "MACs": f"{means['mac_ratio']:.2f}",
            "lr": f"{lr:.1e}",
            "img/s": f"{images_per_second:.0f}",
        }
        self._bar.set_postfix(shown)
        if self._main and self._bar.disable:
            told = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"epoch {self._epoch():.1f} step {self._progress.step}/{self._total} {told} eta {self._eta()}")

    def evaluation(self, values: dict[str, float], name: str = "eval") -> None:
        """Record an evaluation."""
        self._record(name, values)
        self.say(
            f"epoch {self._epoch():.0f} {name}: Acc@1 {values['acc1']:.2f} Acc@5 {values['acc5']:.2f} "
            f"MACs {values['mac_ratio']:.3f} of dense, {values['images']} images"
        )

    def say(self, message: str) -> None:
        """One line on stderr, above the progress bar."""
        if self._main:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        step = self._progress.step
        self._accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        if not self._main:
            return
        line = json.dumps({"kind": kind, "step": step, "epoch": round(self._epoch(), 4), **values})
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._metrics}: {error}") from error

    def _epoch(self) -> float:
        return self._progress.step / self._progress.steps_per_epoch

    def _eta(self) -> str:
        done = self._progress.step - self._first_step
        left = (time.perf_counter() - self._start) / max(1, done) * (self._total - self._progress.step)
        return str(tqdm.format_interval(left))
