"""Look at what a model merged from outside: plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dge_models.evaluating import evaluating
from dge_models.merged import MergedTransformer
from dge_models.padding import sizes_for
from dge_models.single_grid import image_size

__all__ = ["MergingTrace", "find_merged", "trace_merging"]


@dataclass(frozen=True)
class MergingTrace:
    """How the tokens of B images merged in a model with L blocks, in evaluation.

    Attributes:
        logits: [B, classes].
        assignment: One int32 [B, H, W] per block: which group of its image each token of the grid belongs to after the
            block, numbered in the order of the grid.
        groups: int64 [L, B], groups per image after each block, prefix tokens included.
        macs: float64 [B], multiply-accumulates of the whole model.
        static_macs: The same with every token computed.
        grid: (H, W).
    """

    logits: Tensor
    assignment: list[Tensor]
    groups: Tensor
    macs: Tensor
    static_macs: float
    grid: tuple[int, int]


def find_merged(module: nn.Module) -> MergedTransformer | None:
    """The one model that merges tokens in a module, itself included; None if there is none.

    Raises:
        ValueError: There are several; the error names them.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, MergedTransformer)}
    if len(found) > 1:
        names = ", ".join(name or "itself" for name in found)
        raise ValueError(
            f"model: got {type(module).__name__}; expected one model that merges tokens in it, and it holds "
            f"{len(found)}: {names}"
        )
    return next(iter(found.values()), None)


def trace_merging(model: MergedTransformer, images: Tensor) -> MergingTrace:
    """What ``dge_models.trace`` returns for a model from :func:`merge_tokens`.

    Args:
        model: Its training mode is restored; no gradient is recorded.
        images: [B, C, H, W], on the model's device.

    Raises:
        ValueError: Inside :func:`dge_models.padded`.
    """
    if sizes_for(model) is not None:
        raise ValueError("model: merges tokens, and is traced inside padded; expected images of one size, traced alone")
    patch_embed: Any = model.patch_embed
    rows, cols = patch_embed.dynamic_feat_size(image_size(images))
    with evaluating(model), torch.no_grad():
        logits, mergings = model.forward_merged(images)
    macs = model.macs_of(mergings, (rows, cols))
    batch, prefix = images.shape[0], model.num_prefix_tokens
    group = torch.arange(batch * (prefix + rows * cols), device=images.device)
    assignment = []
    for merging in mergings:
        group = group if merging.step is None else merging.step.group[group]
        first = merging.left.cumsum(0) - merging.left + prefix
        own = group.view(batch, -1)[:, prefix:] - first.unsqueeze(1)
        assignment.append(own.view(batch, rows, cols).to(torch.int32))
    left = torch.stack([merging.left for merging in mergings]).cpu()
    return MergingTrace(logits, assignment, left, macs.total, macs.static_total, (rows, cols))
