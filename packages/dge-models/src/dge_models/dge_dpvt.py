"""DPVT and DGE-DPVT at 256 pixels, registered with timm.

Sources: the reference implementation of Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021,
for the plain model; the routed one is this package's own (s124: queries per region side 4, 2 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dge_models.attention import input_width
from dge_models.dpvt import DeformablePyramidVisionTransformer, DGEDeformablePyramidVisionTransformer
from dge_models.families import register_family
from dge_models.macs import LayerMacs, mlp_macs, router_macs
from dge_models.pyramid_family import PyramidFamily, PyramidKinds, pyramid_configs, register_pyramids

__all__ = ["checkpoint_filter_fn"]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """See :meth:`~dge_models.pyramid_family.PyramidFamily.pretrained_weights`."""
    return DEFORMABLE_PYRAMIDS.pretrained_weights(state_dict, model)


_KINDS: PyramidKinds = {
    "dpvt_{}_256": (DeformablePyramidVisionTransformer, "the plain model"),
    "dpvt_dge_s124_{}_256": (DGEDeformablePyramidVisionTransformer, "with Dynamic Grained Encoder blocks"),
}
default_cfgs = pyramid_configs(_KINDS)
register_pyramids(__name__, "DPVT", _KINDS, checkpoint_filter_fn)


class DeformablePyramids(PyramidFamily):
    """DPVT, plain and with routed blocks."""

    models = (DeformablePyramidVisionTransformer,)
    weights = "a deformable pyramid (DPVT)"
    wanted = "a deformable pyramid's, for {}"
    own_layer = "offsets"
    routed_name = "dpvt_dge_s124_small_256"

    def layer_macs(self, block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
        """Values of all tokens; per query offsets and weights, softmax 3 per point, sampling, output and MLP.

        A sample multiplies each channel once per corner and once by the point's weight.
        """
        attn: Any = block.attn
        width, points = input_width(attn), attn.num_points
        fixed = num_tokens * (width + width**2) + router_macs(block, width, grid)
        places = 3 * attn.num_heads * points * (width + 1)
        per_query = width + width**2 + places + 5 * points * width + mlp_macs(block.mlp)
        return LayerMacs(fixed, per_query, num_tokens)


DEFORMABLE_PYRAMIDS = DeformablePyramids()
register_family(DEFORMABLE_PYRAMIDS)
