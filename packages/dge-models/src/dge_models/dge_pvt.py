"""The Pyramid Vision Transformer and DGE-PVT at 256 pixels, registered with timm.

Sources: Wang et al., "Pyramid Vision Transformer", ICCV 2021; Song et al., "Dynamic Grained Encoder for Vision
Transformers", NeurIPS 2021 (s124: queries per region side 4, 2 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dge_models.attention import input_width
from dge_models.families import register_family
from dge_models.macs import LayerMacs, mlp_macs, router_macs
from dge_models.pvt import DGEPyramidVisionTransformer, PyramidVisionTransformer
from dge_models.pyramid_family import PyramidFamily, PyramidKinds, pyramid_configs, register_pyramids

__all__ = ["checkpoint_filter_fn"]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """See :meth:`~dge_models.pyramid_family.PyramidFamily.pretrained_weights`."""
    return PYRAMIDS.pretrained_weights(state_dict, model)


_KINDS: PyramidKinds = {
    "pvt_{}_256": (PyramidVisionTransformer, "the plain model, to compare with"),
    "pvt_dge_s124_{}_256": (DGEPyramidVisionTransformer, "with Dynamic Grained Encoder blocks"),
}
default_cfgs = pyramid_configs(_KINDS)
register_pyramids(__name__, "PVT", _KINDS, checkpoint_filter_fn)


class Pyramids(PyramidFamily):
    """The Pyramid Vision Transformer, plain and with routed blocks."""

    models = (PyramidVisionTransformer,)
    weights = "a pyramid (PVT)"
    wanted = "a pyramid's, for {}"
    own_layer = "kv"
    routed_name = "pvt_dge_s124_small_256"

    def layer_macs(self, block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
        """As for timm's block, over the tokens that are left after a spatial reduction, and the reduction itself."""
        attn: Any = block.attn
        width, keys, reduction = input_width(attn), num_tokens, 0
        if attn.sr is not None:
            keys = (grid[0] // attn.sr.stride[0]) * (grid[1] // attn.sr.stride[1])
            reduction = keys * (attn.sr.weight.numel() + width)
        fixed = num_tokens * width + reduction + 2 * keys * width**2 + router_macs(block, width, grid)
        per_query = width + 2 * width**2 + keys * (2 * width + 3 * attn.num_heads) + mlp_macs(block.mlp)
        return LayerMacs(fixed, per_query, num_tokens)


PYRAMIDS = Pyramids()
register_family(PYRAMIDS)
