"""Whoever wants the routings of a forward pass that other code makes: a stack of listeners, none by default."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from dge_models.routing import Routing

__all__ = ["Listener", "listeners", "listening_to"]


class Listener(Protocol):
    """Is told of the routings of some blocks."""

    def listens_to(self, block: nn.Module) -> bool:
        """Whether it wants a block's routings."""

    def add(self, block: nn.Module, routing: Routing) -> None:
        """Take a routing."""


# Other threads start without listeners: what they run is not what the thread that listens called.
listeners: ContextVar[tuple[Listener, ...]] = ContextVar("dge_models.listeners", default=())


def listening_to(block: nn.Module) -> tuple[Any, ...]:
    """Who wants the routing of the forward pass of a block that is about to be made.

    Nobody inside ``torch.compile``, which would record it once and for all, and nobody in a backward pass, where
    gradient checkpointing repeats a forward pass that was told of before.

    Args:
        block: A routed one.
    """
    if torch.compiler.is_compiling():
        return ()
    wanting = tuple(listener for listener in listeners.get() if listener.listens_to(block))
    if wanting and torch._C._current_graph_task_id() != -1:
        return ()
    return wanting
