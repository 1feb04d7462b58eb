"""Position embeddings for other sizes than a model's own: interpolated once, while parameters stay the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["MOST_BYTES", "MOST_SIZES", "can_be_remembered", "remembered"]

MOST_SIZES = 16
"""So many sizes are remembered of a parameter; those used longest ago go first."""

MOST_BYTES = 2**26
"""So large are they together, unless one alone is larger."""


@dataclass
class _Known:
    """What was computed from parameters, copies of which are kept to tell whether they changed."""

    made_from: list[Tensor]
    results: OrderedDict[Hashable, Tensor] = field(default_factory=OrderedDict)


# Beside the models, not in them: a model is copied, pickled and saved without it, and it goes when the model goes.
_known = WeakTensorKeyDictionary()
_lock = threading.Lock()


def remembered(parameters: Sequence[Tensor], key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """What a function makes of parameters, computed anew only if one of them changed.

    Parameters are compared by value. Neither version counters nor addresses would tell every change: those through
    ``.data`` count no version, and FSDP gathers new values into old memory. That is why only parameters on the CPU are
    remembered: to compare them on an accelerator, the program would have to wait for it.

    Nothing is remembered, and nothing remembered is used, where gradients are recorded, in compiled, exported and
    traced code, in dispatch modes such as ``FakeTensorMode``, and of what is no plain parameter, such as a
    parametrised, sharded or quantised one.

    Args:
        parameters: All that the result depends on beside `key`; at least one.
        key: What tells this result from others of the same first parameter.
        compute: Called without arguments; its result must not be changed in place.

    Returns:
        What `compute` returns, or returned earlier.
    """
    if not can_be_remembered(parameters):
        return compute()
    with _lock:
        known = _known.get(parameters[0])
        if known is not None and _same(known.made_from, parameters) and key in known.results:
            known.results.move_to_end(key)
            result: Tensor = known.results[key]
            return result
    result = compute()
    with _lock:
        known = _known.get(parameters[0])
        if known is None or not _same(known.made_from, parameters):
            known = _known[parameters[0]] = _Known([parameter.detach().clone() for parameter in parameters])
        known.results[key] = result
        while len(known.results) > 1 and _too_many(known.results):
            known.results.popitem(last=False)
    return result


def can_be_remembered(parameters: Sequence[Tensor]) -> bool:
    """Whether :func:`remembered` does more with these than call the function."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    plain = all(type(each) is nn.Parameter and each.device.type == "cpu" for each in parameters)
    return plain and not is_in_torch_dispatch_mode()


def _same(copies: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    if len(copies) != len(parameters):
        return False
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(copies, parameters, strict=True))


def _too_many(results: OrderedDict[Hashable, Tensor]) -> bool:
    return len(results) > MOST_SIZES or sum(each.nbytes for each in results.values()) > MOST_BYTES
