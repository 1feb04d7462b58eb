"""How a run ends before its time: a request to stop is remembered, and at the end all is let go of."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate import Accelerator

from dge_recipes.engine.consensus import Halt
from dge_recipes.engine.run_folder import unlock_folder

__all__ = ["StopSignal", "leaving"]


_ONE_PRESS = 2.0  # seconds; launchers hand on a Ctrl-C that the terminal has sent to their processes too


class StopSignal:
    """Inside ``with``, a signal that asks the process to end is remembered instead.

    These are SIGTERM; SIGHUP, a terminal that was closed; and Ctrl-C, once there is something to save. A second
    Ctrl-C ends the process at once. What is ignored, as under nohup, stays so. Outside of the main thread, where
    Python allows no handlers, nothing changes.

    Attributes:
        request: The signal that came, or ``Halt.NONE``.
        worth_saving: There is something to save; until then Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.request = Halt.NONE
        self.worth_saving = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number is signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, halt, first = time.monotonic(), Halt[signal.Signals(number).name], self.request is Halt.NONE
        if halt is Halt.SIGINT:
            again = not first and now - self._since > _ONE_PRESS
            if again or not self.worth_saving:
                raise KeyboardInterrupt
            if first and os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # print is not for signal handlers
                    os.write(2, b"\nstopping after this step, to save it; Ctrl-C again ends at once\n")
        if first:
            self._since = now
        self.request = max(self.request, halt)


@contextmanager
def leaving(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """After ``with``, the trackers are closed, the folder is unlocked and memory is freed.

    Args:
        accelerator: of the run.
        folder: the run's.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        # On the disk that a run ends for, trackers cannot be closed either; the first error is the one to tell.
        quiet = suppress(Exception) if failed else nullcontext()
        # A launcher sends SIGTERM to all as soon as one has failed; each shall still say why it ends.
        with StopSignal(), quiet, ExitStack() as stack:
            stack.callback(accelerator.free_memory)
            stack.callback(unlock_folder, folder)
            for tracker in getattr(accelerator, "trackers", []):
                stack.callback(tracker.finish)
