"""Find the model inside wrappers: DDP, ``torch.compile``, timm's feature extractors, detectors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dge_models.families import find_family
from dge_models.routed import RoutedModel, routed_blocks

__all__ = ["find_model", "find_routed", "routed_models"]


def routed_models(module: nn.Module) -> dict[str, RoutedModel]:
    """The models with routed blocks that a module holds, itself included, by their names in it; "" is its own."""
    return {
        name: part for name, part in module.named_modules() if isinstance(part, RoutedModel) and routed_blocks(part)
    }


def find_routed(module: nn.Module) -> RoutedModel:
    """The one model with routed blocks that a module is or holds.

    Args:
        module: The model, or what holds it: DDP, an ``OptimizedModule``, timm's ``FeatureGetterNet``, a detector.

    Raises:
        ValueError: It holds none, or several; the error names them.
    """
    models = routed_models(module)
    if len(models) == 1:
        return next(iter(models.values()))
    got = f"model: got {type(module).__name__}"
    if models:
        names = ", ".join(name or "itself" for name in models)
        raise ValueError(f"{got}; expected one model with routed blocks in it, and it holds {len(models)}: {names}")
    if routed_blocks(module):
        raise ValueError(
            f"{got}; expected a model with routed blocks, or a module that holds one, and it holds the blocks alone "
            "(as graphs from torch.fx do)"
        )
    if isinstance(module, RoutedModel):
        raise ValueError(f"{got}; expected a model with routed blocks, and none of its blocks is routed")
    kind = type(module).__name__
    raise ValueError(
        f"{got}; expected a model with routed blocks, or a module that holds one ({kind} has no routed block; "
        f"looked at all {_count(module)} modules in it)"
    )


def find_model(module: nn.Module) -> nn.Module:
    """The one model whose MACs are known that a module is or holds: one with routed blocks, else a plain one.

    Args:
        module: As in :func:`find_routed`; plain vision transformers and pyramids are found too.

    Raises:
        ValueError: It holds none, or several.
    """
    if find_family(module) is not None:
        return module
    if routed_models(module) or routed_blocks(module):
        return find_routed(module)
    found = _outermost(module, lambda part: find_family(part) is not None)
    if len(found) != 1:
        what = f"it holds {len(found)}" if found else f"none of the {_count(module)} modules in it is one"
        raise ValueError(
            f"model: got {type(module).__name__}; expected a vision transformer or pyramid, or a module that holds "
            f"one, and {what}"
        )
    return found[0]


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    if wanted(module):
        return [module]
    return [found for child in module.children() for found in _outermost(child, wanted)]


def _count(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())
