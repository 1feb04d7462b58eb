"""Whoever wants the routings of a forward pass that other code makes: a stack of listeners, none by default."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import nn

from dge_models.graph_breaks import outside_graphs
from dge_models.routing import Routing

__all__ = ["Listener", "heard_by", "listeners", "tell"]


class Listener(Protocol):
    """Is told of the routings of some blocks."""

    def listens_to(self, block: nn.Module) -> bool:
        """Whether it wants a block's routings."""

    def add(self, block: nn.Module, routing: Routing) -> None:
        """Take a routing."""


in_use = False
"""Whether any thread listens. Models look at it first, and compiled code guards on it."""

_lock = threading.Lock()
_count = 0

# Other threads start without listeners: what they run is not what the thread that listens called.
listeners: ContextVar[tuple[Listener, ...]] = ContextVar("dge_models.listeners", default=())


@contextmanager
def heard_by(*more: Listener) -> Iterator[None]:
    """Inside, these listen to this thread's forward passes, beside those who do already."""
    token = listeners.set((*listeners.get(), *more))
    _change_count(1)
    try:
        yield
    finally:
        _change_count(-1)
        listeners.reset(token)


def _change_count(change: int) -> None:
    global _count, in_use
    with _lock:
        _count += change
        in_use = _count > 0


@outside_graphs("somebody wants to know what is routed, see dge_models.collect_routings")
def tell(blocks: Sequence[nn.Module], routings: Sequence[Routing]) -> None:
    """Tell those who want to know of a forward pass.

    Nobody is told of one in a backward pass, where gradient checkpointing repeats what was told before.

    Args:
        blocks: Routed ones, in network order.
        routings: One per block.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    for block, routing in zip(blocks, routings, strict=True):
        for listener in listeners.get():
            if listener.listens_to(block):
                listener.add(block, routing)
