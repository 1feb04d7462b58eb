"""A plan that is still being counted on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dge_kernels.plan import QueryPlan

__all__ = ["HostCopy", "QueryPlanFuture"]


class HostCopy:
    """A copy of a CUDA tensor on its way to pinned memory, queued on the tensor's current stream."""

    def __init__(self, tensor: Tensor) -> None:
        with torch.cuda.device(tensor.device):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def ready(self) -> bool:
        """Whether :meth:`read` would return at once."""
        return bool(self._arrived.query())

    def read(self) -> Tensor:
        """The copy; waits for it, and for nothing that was queued after it."""
        self._arrived.synchronize()
        return self._host


class QueryPlanFuture:
    """What :func:`dge_kernels.plan_queries_async` returns. It keeps `choice` alive; don't write into it meanwhile."""

    def __init__(self, ready: Callable[[], bool], finish: Callable[[], QueryPlan]) -> None:
        self._ready, self._finish = ready, finish
        self._plan: QueryPlan | None = None

    def done(self) -> bool:
        """Whether :meth:`result` would return without waiting for the device."""
        return self._plan is not None or self._ready()

    def result(self) -> QueryPlan:
        """The plan. The first call waits until the device has counted the queries; later ones return the same plan.

        Call it on the stream on which the plan was started.
        """
        if self._plan is None:
            self._plan = self._finish()
        return self._plan
