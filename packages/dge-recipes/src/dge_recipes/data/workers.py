"""Data loading processes that outlive a request to stop, and not the process that they work for."""

import atexit
import multiprocessing
import os
import signal
from functools import cache
from types import FrameType
from typing import Any

__all__ = ["WorkerSignals", "worker_signals"]


class WorkerSignals:
    """Called in every worker at its start: has it ignore requests to stop until its parent exits.

    A cluster's SIGTERM reaches every process of a job, as a terminal's Ctrl-C and its closing do; a run that lost its
    workers to one of them could not save in peace.
    But at its exit a process ends its workers by SIGTERM too, and waits for them.

    Args:
        ending: a byte in shared memory, set when the parent exits.
    """

    def __init__(self, ending: Any) -> None:
        self._ending = ending

    def __call__(self, worker: int) -> None:
        """Install the handlers."""
        signal.signal(signal.SIGTERM, self._handle)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ending.value:
            os._exit(0)


@cache
def worker_signals() -> WorkerSignals:
    """The one of this process, for ``DataLoader(worker_init_fn=...)``."""
    ending = multiprocessing.Value("b", 0, lock=False)
    # Runs before multiprocessing's own exit function, which was registered earlier and joins the workers.
    atexit.register(setattr, ending, "value", 1)
    return WorkerSignals(ending)
