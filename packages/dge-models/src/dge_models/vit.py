"""timm's vision transformers with routed blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dge_models.attention import input_width
from dge_models.families import BLOCK, Family, has_blocks, register_family
from dge_models.macs import LayerMacs, ModelMacs, mlp_macs, router_macs, single_grid_macs
from dge_models.routed import RoutedTransformer, route_blocks, routed_blocks
from dge_models.unconvertible import reason_against_parts

__all__ = ["DGEVisionTransformer", "DGEVisionTransformerDistilled", "route_blocks", "routed_blocks"]


class DGEVisionTransformer(RoutedTransformer, VisionTransformer):
    """timm's ``VisionTransformer`` whose blocks route their queries.

    Everything else, parameter names included, is timm's. See :class:`~dge_models.routed.RoutedTransformer` for the
    arguments that are not timm's.
    """


class DGEVisionTransformerDistilled(RoutedTransformer, VisionTransformerDistilled):
    """timm's ``VisionTransformerDistilled`` (two prefix tokens, two heads) whose blocks route their queries.

    See :class:`DGEVisionTransformer` for the arguments.
    """


def _layer_macs(block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
    """Norms C per row, projections, both attention products, softmax 3 per score, MLP with activation."""
    attn: Any = block.attn
    width, inner = input_width(attn), attn.num_heads * attn.head_dim
    gate = inner * width if getattr(attn, "gate", None) is not None else 0
    fixed = num_tokens * (width + 2 * width * inner)
    attention = num_tokens * (2 * inner + 3 * attn.num_heads)
    per_query = width + 2 * width * inner + gate + attention + mlp_macs(block.mlp)
    return LayerMacs(fixed + router_macs(block, width, grid), per_query, num_tokens)


_HALF = re.compile(rf"(?P<attn>{BLOCK}attn)\.(?P<half>q|kv)\.(?P<kind>weight|bias)")


class VisionTransformers(Family):
    """timm's vision transformers, and those with routed blocks."""

    models = (VisionTransformer,)
    converts: ClassVar = {
        VisionTransformer: DGEVisionTransformer,
        VisionTransformerDistilled: DGEVisionTransformerDistilled,
    }
    weights = "a vision transformer without stages (DeiT)"

    def model_macs(self, model: Any, grid: tuple[int, int]) -> ModelMacs:
        """Blocks with all tokens as keys and values, the patch embedding, pooling and the heads."""
        return single_grid_macs(model, grid, _layer_macs)

    def owns_keys(self, keys: Iterable[str]) -> bool:
        """Blocks with numbers, without stages."""
        return has_blocks(keys)

    def to_timm_keys(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``attn.q`` and ``attn.kv`` (keys first, then values) become timm's ``attn.qkv``."""
        out: dict[str, Tensor] = {}
        for key, value in state_dict.items():
            half = _HALF.fullmatch(key)
            pair = [f"{half['attn']}.{part}.{half['kind']}" for part in ("q", "kv")] if half else []
            if half is None or not all(part in state_dict for part in pair):
                out[key] = value
            elif key == pair[0]:
                out[f"{half['attn']}.qkv.{half['kind']}"] = torch.cat([value, state_dict[pair[1]]])
        return out

    def reason_against(self, model: nn.Module) -> str | None:
        """Hybrids, and blocks that are not timm's plain ones."""
        return reason_against_parts(model) if type(model) in self.converts else None


register_family(VisionTransformers())
