"""The dense model behind a cheaper one, to compare with."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from dge_models.finding import routed_models
from dge_models.merging_trace import find_merged
from dge_models.projections import copied
from dge_models.routed import routed_blocks

__all__ = ["dense_copy"]


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that computes every query of every token, with the same weights.

    Args:
        model: With routed blocks, or from :func:`merge_tokens`; of any other model, a plain copy. It is left as it is.

    Returns:
        The copy, in the mode of `model`. Its blocks are timm's, or a pyramid's plain ones; routers are gone.
    """
    copy: Any = copied(model)
    merged: Any = find_merged(copy)
    if merged is not None:
        for block in merged.blocks:
            block.__class__ = Block
        distilled = isinstance(merged, VisionTransformerDistilled)
        merged.__class__ = VisionTransformerDistilled if distilled else VisionTransformer
    if routed_models(copy):
        for block in routed_blocks(copy):
            plain = type(block).plain
            del block.router
            block.__class__ = plain  # type: ignore[assignment]  # the way back of DGEBlock.adopt
    return copy
