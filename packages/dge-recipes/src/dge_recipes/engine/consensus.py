"""What all processes of a run decide together, without waiting for a device: whether to halt, and why."""

from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

__all__ = ["Agreement", "Halt"]


class Halt(IntEnum):
    """Why a run ends before its last step; of several reasons the largest counts."""

    NONE = 0
    SIGHUP = 1
    SIGINT = 2
    SIGTERM = 3
    BAD_NUMBER = 4


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
