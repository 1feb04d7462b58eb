"""A limit on the time that a study takes."""

import os
import signal
import threading
from types import TracebackType

__all__ = ["TimeLimit"]


class TimeLimit:
    """Inside ``with``, this process gets SIGTERM when the time is over, as from a cluster's scheduler.

    The run under way then saves where it stands; enter :class:`~dge_recipes.engine.interruption.StopSignal` first, for
    a signal that comes between two runs.

    Args:
        minutes: None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.over = False
        self._timer = None if minutes is None else threading.Timer(60 * minutes, self.expire)

    def expire(self) -> None:
        """The time is over."""
        self.over = True
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> "TimeLimit":
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
