"""What both routed pyramids share; what each computes is in test_dge_pvt.py and test_dge_dpvt.py."""

from __future__ import annotations

import pytest
import torch
from small_models import Build

from dge_models.encoder import DGEBlock
from dge_models.routed_pyramid import RoutedPyramid

both = pytest.mark.parametrize("name", ["pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"])


@both
def test_every_block_routes_on_the_grid_of_its_stage(small: Build, name: str) -> None:
    model = small(name)
    assert isinstance(model, RoutedPyramid)
    blocks = [block for _, stage in model.stages.named_children() for block in stage.blocks]
    assert all(isinstance(block, DGEBlock) for block in blocks)
    with torch.no_grad():
        logits, routings = model.forward_routed(torch.randn(2, 3, 64, 96))
    assert len(routings) == len(blocks)
    assert [routing.grid for routing in routings] == sorted((routing.grid for routing in routings), reverse=True)
    assert routings[0].grid == (16, 24)
    assert torch.equal(model(torch.zeros(1, 3, 64, 96)), model.forward_routed(torch.zeros(1, 3, 64, 96))[0])
    assert logits.shape[0] == 2


@both
def test_noise_is_one_tensor_per_block(small: Build, name: str) -> None:
    model = small(name).train()
    with pytest.raises(ValueError, match=r"noise: got 1 tensors; expected one per routed block, \d+"):
        model.forward_routed(torch.randn(1, 3, 64, 64), noise=[torch.zeros(1)])
