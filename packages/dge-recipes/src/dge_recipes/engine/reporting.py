"""What a run tells while it trains: means of its losses, where the time goes, progress bar, metrics and trackers."""

import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dge_recipes.engine.losses import LOSS_NAMES, SHARES
from dge_recipes.engine.progress import Progress
from dge_recipes.machine_errors import write_error
from dge_recipes.tasks.task import TaskEvaluation

__all__ = ["Averages", "Clock", "Reporter"]

T = TypeVar("T")

_ALIKE = {"loss", "task", "distillation", "budget", "mac_ratio", SHARES}  # what all tasks have
_SHORT = {"accuracy": "acc"}


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

    def resume(self, step: int, total_steps: int) -> None:
        """The run stands at this step already, of so many."""
        self._first_step, self._start = step, time.perf_counter()
        self._total = self._bar.total = total_steps
        self._bar.update(step - self._bar.n)

    def step(self) -> None:
        """One optimiser step is done."""
        self._bar.update(1)

    def training(self, means: dict[str, Any], lr: float, timing: dict[str, float]) -> None:
        """Record what happened since the last report.

        Args:
            means: losses, MAC ratio and what the task has beside them; ``split_shares`` if there are routers.
            lr: learning rate of the step just done.
            timing: ``images_per_second``, and ``data_share`` of the time spent waiting for images.
        """
        memory = _memory(self._accelerator.device)
        self._record("train", {**means, "lr": lr, **timing, "memory_mib": memory})
        shown = {
            "loss": f"{means['loss']:.3f}",
            **{_SHORT.get(name, name): f"{value:.3f}" for name, value in means.items() if name not in _ALIKE},
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

    def evaluation(self, found: TaskEvaluation, figures: Mapping[str, str], name: str = "eval") -> None:
        """Record an evaluation.

        Args:
            found: of the network or of its moving average.
            figures: what it says of how good the network is, by name.
            name: ``eval`` or ``ema``.
        """
        self._record(name, found.as_dict())
        told = " ".join(f"{figure} {value}" for figure, value in figures.items())
        self.say(
            f"epoch {self._epoch():.0f} {name}: {told} MACs {found.mac_ratio:.3f} of dense, {found.images} images"
            + (f", {found.unreadable} unreadable" if found.unreadable else "")
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
            raise write_error(f"the trackers cannot write to {self._metrics.parent}", error) from error
        if not self._main:
            return
        line = json.dumps({"kind": kind, "step": step, "epoch": round(self._epoch(), 4), **values})
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise write_error(f"cannot write {self._metrics}", error) from error

    def _epoch(self) -> float:
        return self._progress.place / self._progress.steps_per_epoch

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


class Clock:
    """Time since the last report: all of it, and the part spent waiting for the data loader.

    Args:
        progress: of the run; its seconds are advanced at every report.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since the last report."""
        self.steps, self._waited, self._start = 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each takes to arrive counted as waiting."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def lap(self) -> dict[str, float]:
        """``images_per_second`` and ``data_share``, the fraction spent waiting, since the last call."""
        elapsed = time.perf_counter() - self._start
        self._progress.seconds += elapsed
        speed = self.steps * self._progress.global_batch / elapsed
        share = self._waited / elapsed
        self.restart()
        return {"images_per_second": speed, "data_share": round(share, 4)}


class Averages:
    """Means since the last report, kept on the device until they are asked for.

    They are part of a checkpoint, so that the log of a resumed run is that of a run that was never stopped.

    Args:
        accelerator: of this run.
        names: of a forward's scalars.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str] = LOSS_NAMES) -> None:
        self._accelerator, self._names = accelerator, names
        self._sums: Tensor | None = None
        self._count = 0
        self._shape: tuple[int, ...] = (0, 0)

    def scalars(self, losses: dict[str, Tensor]) -> Tensor:
        """The scalars of one forward as one tensor float32 [len(names)], on the device."""
        return torch.stack([losses[name].detach().float() for name in self._names])

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add one forward's numbers; no synchronisation with the device."""
        self._shape = tuple(losses[SHARES].shape)
        values = torch.cat([self.scalars(losses), losses[SHARES].flatten().float()])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def pop(self) -> dict[str, Any]:
        """Means over all processes since the last call, and ``split_shares`` if there are routers.

        Every process must call it. Waits for the device.
        """
        values = self._mean_sums().div(max(1, self._count)).tolist()
        self._sums, self._count = None, 0
        means: dict[str, Any] = dict(zip(self._names, values, strict=False))
        layers, splits = self._shape
        shares = values[len(self._names) :]
        if layers and shares:
            rows = [shares[layer * splits : (layer + 1) * splits] for layer in range(layers)]
            means[SHARES] = [[round(share, 4) for share in row] for row in rows]
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far; every process must call it."""
        return {"count": self._count, "shape": list(self._shape), "sums": self._mean_sums().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved sums."""
        self._count, self._shape = state["count"], tuple(state["shape"])
        self._sums = torch.tensor(state["sums"], device=self._accelerator.device) if self._count else None

    def _mean_sums(self) -> Tensor:
        """The processes' mean of the sums."""
        size = len(self._names) + self._shape[0] * self._shape[1]
        sums = torch.zeros(size, device=self._accelerator.device) if self._sums is None else self._sums
        mean: Tensor = self._accelerator.reduce(sums, reduction="mean")
        return mean
