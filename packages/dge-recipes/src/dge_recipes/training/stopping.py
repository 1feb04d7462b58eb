"""Ending a run in good order, at the same step in every process, without waiting for a device."""

import os
import signal
import threading
import time
from contextlib import suppress
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

__all__ = ["Agreement", "Halt", "StopSignal"]


_ONE_PRESS = 2.0  # seconds; launchers hand on a Ctrl-C that the terminal has sent to their processes too


class Halt(IntEnum):
    """Why a run ends before its last step; of several reasons the largest counts."""

    NONE = 0
    SIGHUP = 1
    SIGINT = 2
    SIGTERM = 3
    BAD_NUMBER = 4


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


class Agreement:
    """The largest of the processes' reasons to halt.

    The processes compare one integer over gloo, between CPUs, so that no device has to be waited for; and they
    look at the answer one step later, when it has long arrived.

    Args:
        accelerator: of this run. Every process must make one, and call it alike.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._under_way: tuple[Tensor, Any] | None = None

    def share(self, halt: Halt) -> Halt:
        """Hand in this process's reason; returns what was agreed on at the call before (alone: this reason)."""
        if self._group is None:
            return halt
        agreed = self._collect()
        self._start(halt)
        return agreed

    def settle(self, halt: Halt) -> Halt:
        """Hand in this process's reason and wait for the others'."""
        if self._group is None:
            return halt
        before = self._collect()
        self._start(halt)
        return max(before, self._collect())

    def _start(self, halt: Halt) -> None:
        value = torch.tensor([int(halt)])
        self._under_way = value, dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _collect(self) -> Halt:
        if self._under_way is None:
            return Halt.NONE
        value, work = self._under_way
        work.wait()
        self._under_way = None
        return Halt(int(value))
