"""What a run tells while it trains: progress bar, ``metrics.jsonl`` and experiment trackers."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm  # type: ignore[import-untyped]

from dge_recipes.errors import UserError
from dge_recipes.training.losses import SHARES
from dge_recipes.training.progress import Progress

__all__ = ["Reporter"]


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

    def training(self, means: dict[str, Any], lr: float, timing: dict[str, float]) -> None:
        """Record what happened since the last report.

        Args:
            means: losses, accuracy and MAC ratio; ``split_shares`` if there are routers.
            lr: learning rate of the step just done.
            timing: ``images_per_second``, and ``data_share`` of the time spent waiting for images.
        """
        memory = _memory(self._accelerator.device)
        self._record("train", {**means, "lr": lr, **timing, "memory_mib": memory})
        shown = {
            "loss": f"{means['loss']:.3f}",
            "acc": f"{means['accuracy']:.3f}",
            "MACs": f"{means['mac_ratio']:.2f}",
            "lr": f"{lr:.1e}",
            "img/s": f"{timing['images_per_second']:.0f}",
            "data": f"{timing['data_share']:.0%}",
            "MiB": f"{memory:.0f}",
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
            + (f", {values['unreadable']} unreadable" if values["unreadable"] else "")
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
        try:
            self._accelerator.log({f"{kind}/{name}": value for name, value in _scalars(values)}, step=step)
        except OSError as error:
            raise UserError(f"the trackers cannot write to {self._metrics.parent}: {error}") from error
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


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What trackers draw: every number by itself."""
    for name, value in values.items():
        if name != SHARES:
            yield name, value
            continue
        for layer, row in enumerate(value):
            for split, share in enumerate(row):
                yield f"{name}/layer_{layer:02d}_split_{split}", share


def _memory(device: torch.device) -> float:
    """The most that was in use so far: of the device's memory, or without one of the process's, in MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
