"""Ending a run in good order, at the same step in every process, without waiting for a device."""

import signal
import threading
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

__all__ = ["Agreement", "Halt", "StopSignal"]


class Halt(IntEnum):
    """Why a run ends before its last step; of several reasons the largest counts."""

    NONE = 0
    SIGNAL = 1
    BAD_NUMBER = 2


class StopSignal:
    """Inside ``with``, SIGTERM is remembered instead of ending the process.

    Outside of the main thread, where Python allows no handlers, it changes nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


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
