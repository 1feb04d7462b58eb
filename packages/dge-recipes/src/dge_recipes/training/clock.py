"""Where the time of training goes."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dge_recipes.training.progress import Progress

__all__ = ["Clock"]

T = TypeVar("T")


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
