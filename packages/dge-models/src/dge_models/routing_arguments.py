"""How a model routes or merges, as arguments that create it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dge_models.encoder import DGEBlock
from dge_models.families import find_family

__all__ = ["ENTRY", "ROUTING_ARGUMENTS", "routing_arguments"]

ENTRY = "dge_vit"
"""The registered name of converted models."""

ROUTING_ARGUMENTS = (
    *("splits", "layers", "training_mode", "drop_path_mode"),
    *("fixed_counts", "fixed_image_size", "trained_splits"),
    *("merge_thresholds", "merge_limits", "merge_counts"),
)
"""What the registered names of routed and merging models take beside the arguments of plain ones."""


def routing_arguments(model: nn.Module) -> dict[str, Any]:
    """How a model routes or merges, as arguments of this package's registered names; values that JSON can hold.

    Args:
        model: With or without routed blocks, or with blocks that merge.
    """
    merging_arguments: Callable[[], dict[str, Any]] | None = getattr(model, "merging_arguments", None)
    if merging_arguments is not None:
        return merging_arguments()
    if not hasattr(model, "forward_routed"):
        return {}
    routed = [module for module in model.modules() if isinstance(module, DGEBlock)]
    blocks = getattr(model, "blocks", None)
    layers = None
    if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(routed) < len(blocks):
        layers = [index for index, block in enumerate(blocks) if block in routed]
    if not routed:
        return {} if layers is None else {"layers": layers}
    first = routed[0]
    splits = list(first.router.splits)
    arguments: dict[str, Any] = {"splits": splits, "trained_splits": splits}
    arguments.update(training_mode=first.training_mode, drop_path_mode=first.drop_path_mode)
    if layers is not None:
        arguments["layers"] = layers
    layouts = [block.fixed_layout for block in routed if block.fixed_layout is not None]
    if layouts:
        arguments["fixed_counts"] = [list(layout.counts) for layout in layouts]
        patch = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).stride
        size = [extent * int(pixels) for extent, pixels in zip(layouts[0].grid, patch, strict=True)]
        family = find_family(model)
        own = None if family is None else family.input_size(model)
        if own is None or family is None or family.token_grid(model, own) != layouts[0].grid:
            arguments["fixed_image_size"] = size
    return arguments
