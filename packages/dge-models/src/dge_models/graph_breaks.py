"""Functions that torch.compile must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

__all__ = ["outside_graphs"]

Function = TypeVar("Function", bound=Callable[..., object])


def outside_graphs(reason: str, *, recursive: bool = True) -> Callable[[Function], Function]:
    """A decorator: compiled code breaks off at the function, and goes on after it.

    Args:
        reason: What the compiler says of the break, and in its error with ``fullgraph=True``.
        recursive: Whether what the function calls is not compiled either.
    """
    return cast(Callable[[Function], Function], torch.compiler.disable(recursive=recursive, reason=reason))
