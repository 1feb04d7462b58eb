"""Linear layers as people change them: called as they are, and read only where that is the same computation.

Adapters, quantisation, offloading, pruning, parametrisation and sharding replace, wrap or hook a linear layer. All of
them work as long as the layer is called. Parts of its weight are used only of a layer that nothing has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _everywhere

__all__ = ["copied", "has_hooks", "hooked_everywhere", "is_own_tensor", "is_plain", "linear_shape"]
__all__ += ["linear_shapes", "own_parameter", "placement", "project"]

# A parameter; what torch.func puts in its place; what either is while torch traces a program.
_OWN_TENSORS = (nn.Parameter, Tensor)
_TRACING = "torch._subclasses."

Module = TypeVar("Module", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's ``forward``: hooks of its own, or a replaced ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes ``F.linear`` of its own weight and bias and nothing else, so that parts of them may do.

    Exactly ``nn.Linear``, no subclass, wrapper or parametrisation; no hooks (pruning has one) and no replaced
    ``forward`` (offloading has one); and a weight that is an ordinary tensor, neither quantised nor sharded.

    Args:
        layer: Any module.
    """
    if type(layer) is not nn.Linear or has_hooks(layer) or hooked_everywhere():
        return False
    return is_own_tensor(layer.weight)


def is_own_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a weight is an ordinary tensor, neither quantised nor sharded nor missing."""
    kind = type(value)
    return kind in _OWN_TENSORS or kind.__module__.startswith(_TRACING)


def copied(module: Module) -> Module:
    """A deep copy, also of layers that keep a weight which a hook computes before every call, as pruned ones do."""
    computed = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def hooked_everywhere() -> bool:
    """Whether there are hooks for all modules of the process. Torch's own only watch, as its flop counter's do."""
    if not (
        _everywhere._global_forward_hooks
        or _everywhere._global_forward_pre_hooks
        or _everywhere._global_backward_hooks
        or _everywhere._global_backward_pre_hooks
    ):
        return False
    groups: tuple[Mapping[int, Any], ...] = (
        _everywhere._global_forward_hooks,
        _everywhere._global_forward_pre_hooks,
        _everywhere._global_backward_hooks,
        _everywhere._global_backward_pre_hooks,
    )
    hooks = (hook for group in groups for hook in group.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def project(layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Some of the outputs of a linear layer: of a plain one without computing the others, else by calling it.

    Args:
        layer: Of E outputs.
        x: [..., C].
        rows: Which outputs, R of them.

    Returns:
        [..., R], what ``layer(x)[..., rows]`` is.
    """
    if is_plain(layer):
        return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    out: Tensor = layer(x)
    return out[..., rows]


def _own_shape(module: nn.Module) -> tuple[int, int] | None:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def linear_shape(layer: nn.Module | None) -> tuple[int, int] | None:
    """The widths of a linear layer's input and output, and None of what is not one.

    Args:
        layer: Anything with ``in_features`` and ``out_features``, as quantised layers and adapters have them, or a
            module around such a layer. A container may hold anything else and is none.
    """
    if layer is None or isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    return next((shape for part in layer.modules() if (shape := _own_shape(part)) is not None), None)


def linear_shapes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The widths of the linear layers inside a module, in order; an adapter counts as the layer that it adapts."""
    for child in module.children():
        shape = _own_shape(child)
        if shape is None:
            yield from linear_shapes(child)
        else:
            yield shape


def own_parameter(gate: nn.Module, name: str) -> nn.Parameter:
    """A gate's parameter where a change of it lasts: not packed, offloaded, sharded or computed from something else.

    Args:
        gate: Of a router.
        name: "weight" or "bias".

    Raises:
        ValueError: It has none.
    """
    parameter = getattr(gate, name, None)
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        raise ValueError(
            f"model: a router's gate is a {type(gate).__name__} without a {name} of its own; expected one, set the "
            "budget before quantising, pruning, sharding or offloading the gates"
        )
    return parameter


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes and in which dtype: those of its first floating-point parameter.

    Without one, as of layers whose weights are packed, the CPU and float32. Of an offloaded one, whose weights are
    fetched when it is called, the device that accelerate's hook brings them to, else the CPU.
    """
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if parameter.is_meta and has_hooks(part):
                hook = getattr(part, "_hf_hook", None)
                return torch.device(getattr(hook, "execution_device", None) or "cpu"), parameter.dtype
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32
