from __future__ import annotations

from functools import partial

import pytest
import torch

from dge_models.dge_pvt import PYRAMIDS
from dge_models.pvt_block import PyramidBlock
from dge_models.pyramid_stage import PyramidStage, resize_positions


def test_stored_positions_are_fitted_to_the_model() -> None:
    new_block = partial(PyramidBlock, num_heads=2, mlp_ratio=2)
    model = torch.nn.Sequential(
        PyramidStage((4, 6), 3, 8, 1, new_block, patch_size=2, class_token=False, drop_path=[0.0])
    )
    stored = {"0.pos_embed": torch.randn(1, 1 + 25, 8), "0.cls_token": torch.randn(1, 1, 8), "other": torch.ones(1)}
    fitted = PYRAMIDS.fit_positions(stored, model)
    assert fitted.keys() == {"0.pos_embed", "other"}
    expected = resize_positions(stored["0.pos_embed"][:, 1:], (5, 5), (4, 6), 0)
    torch.testing.assert_close(fitted["0.pos_embed"], expected)
    with pytest.raises(ValueError, match=r"0\.pos_embed: got 27 tokens; expected 24 as in the model, or 0 and a sq"):
        PYRAMIDS.fit_positions({"0.pos_embed": torch.randn(1, 27, 8)}, model)


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("stages.0.blocks.1.attn.kv.weight", True),
        ("module.block1.1.attn.kv.base_layer.weight", True),
        ("stages.0.blocks.1.attn.v.weight", False),
        ("stages.0.blocks.1.norm1.weight", False),
        ("blocks.1.attn.kv.weight", False),
    ],
)
def test_a_family_of_pyramids_is_known_by_a_layer_of_its_own(key: str, own: bool) -> None:
    assert PYRAMIDS.owns_keys(["head.weight", key]) is own
