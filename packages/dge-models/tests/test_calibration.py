from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from small_models import Build, scatter_routing
from torch import Tensor

from dge_models import count_macs, from_timm, set_budget, set_fixed_queries
from dge_models.vit import routed_blocks


def batches(size: int = 32, count: int = 3) -> list[Tensor]:
    """Images of different strength, so that routing differs among them."""
    return [torch.randn(16, 3, size, size) * torch.rand(16, 1, 1, 1) * 3 for _ in range(count)]


def evaluated_ratio(model: Any, loader: list[Tensor]) -> float:
    counts = [count_macs(model, images) for images in loader]
    return torch.cat([count.total / count.static_total for count in counts]).mean().item()


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.7, 0.9])
def test_ratios_are_met_in_few_passes(small: Build, ratio: float) -> None:
    model, loader = small(), batches()
    setting = set_budget(model, ratio, loader)
    assert setting.ratio == pytest.approx(ratio, abs=0.005)
    assert setting.ratio == pytest.approx(evaluated_ratio(model, loader), abs=1e-6)
    assert (setting.target, setting.images) == (ratio, 48)
    assert setting.passes <= 6


@pytest.mark.parametrize("kwargs", [{"img_size": 28}, {"splits": (2, 1)}, {"layers": [0, 2]}])
def test_other_grids_splits_and_layers(small: Build, kwargs: dict[str, Any]) -> None:
    model, loader = small(**kwargs), batches(kwargs.get("img_size", 32))
    assert set_budget(model, 0.8, loader).ratio == pytest.approx(0.8, abs=0.01)
    assert evaluated_ratio(model, loader) == pytest.approx(0.8, abs=0.01)


def test_both_ends_are_met_exactly_and_lead_back(small: Build) -> None:
    model, loader = small(), batches()
    finest = set_budget(model, 1.0, loader)
    assert finest.ratio == 1.0
    coarsest = set_budget(model, finest.cheapest, loader)
    assert coarsest.ratio == pytest.approx(finest.cheapest, abs=1e-6)
    assert set_budget(model, 0.6, loader).ratio == pytest.approx(0.6, abs=0.01)


def test_pyramids(small: Build) -> None:
    model = timm.create_model(
        "pvt_dge_s124_tiny_256", img_size=64, embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), num_classes=3
    )
    scatter_routing(model)
    loader = batches(64, 2)
    assert set_budget(model, 0.6, loader).ratio == pytest.approx(0.6, abs=0.01)
    assert evaluated_ratio(model, loader) == pytest.approx(0.6, abs=0.01)


def test_only_router_biases_change_and_all_by_one_shift(small: Build) -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    setting = set_budget(model, 0.5, batches())
    price = torch.tensor([1.0, 0.25, 0.0625])
    for name, value in model.state_dict().items():
        if name.endswith("router.gate.bias"):
            torch.testing.assert_close(value - before[name], setting.shift * price)
        else:
            assert torch.equal(value, before[name])


def test_batches_with_labels_images_of_several_sizes_and_modes(small: Build) -> None:
    model = small(dynamic_img_size=True).train()
    model.blocks[0].eval()
    sizes = [(32, 32), (20, 44)]
    loader = [(torch.randn(12, 3, *size), torch.zeros(12)) for size in sizes]
    setting = set_budget(model, 0.5, loader)
    assert setting.ratio == pytest.approx(0.5, abs=0.02)
    assert (model.training, model.blocks[0].training, model.blocks[1].training) == (True, False, True)


def test_half_precision_weights(small: Build) -> None:
    model = small().bfloat16()
    loader = [images.bfloat16() for images in batches()]
    assert set_budget(model, 0.5, loader).ratio == pytest.approx(0.5, abs=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_routers_that_see_no_difference_are_refused_and_left_alone() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", img_size=128, embed_dim=32, depth=2, num_heads=2)
    model = from_timm(plain).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"no shift .* gives 0\.7: it jumps from 0\..* to 1\.000 .*tell regions apart"):
        set_budget(model, 0.7, [torch.randn(2, 3, 128, 128)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert set_budget(model, 1.0, [torch.randn(2, 3, 128, 128)]).shift == 0.0


def test_weights_are_restored_when_the_loader_fails(small: Build) -> None:
    class Breaks:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield torch.randn(4, 3, 32, 32)
            if self.passes == 2:
                raise OSError("disk gone")

    model = small()
    before = [block.router.gate.bias.clone() for block in routed_blocks(model)]
    with pytest.raises(OSError, match="disk gone"):
        set_budget(model, 0.5, Breaks())
    assert all(torch.equal(b.router.gate.bias, old) for b, old in zip(routed_blocks(model), before, strict=True))


@pytest.mark.parametrize("ratio", [0.0, 1.2, float("nan")])
def test_ratios_outside_zero_to_one_are_refused(small: Build, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio: got .*; expected a MAC ratio in \(0, 1\]"):
        set_budget(small(), ratio, batches())


def test_bad_input_is_refused(small: Build) -> None:
    model, loader = small(), batches(count=1)
    with pytest.raises(ValueError, match=r"ratio: got 0\.1; expected at least 0\.2134, .* cheapest routing"):
        set_budget(model, 0.1, loader)
    with pytest.raises(ValueError, match="loader: got no images"):
        set_budget(model, 0.5, [])
    with pytest.raises(TypeError, match=r"loader: got an iterator \(list_iterator\)"):
        set_budget(model, 0.5, iter(loader))
    with pytest.raises(TypeError, match="loader: got a batch of type dict; expected an image tensor"):
        set_budget(model, 0.5, [{"image": loader[0]}])
    with pytest.raises(ValueError, match="VisionTransformer has no routed block"):
        set_budget(timm.create_model("vit_tiny_patch16_224", depth=1), 0.5, loader)
    with pytest.raises(ValueError, match=r"got Sequential; expected one model with routed blocks in it, .* 2: 0, 1"):
        set_budget(torch.nn.Sequential(model, copy.deepcopy(model)), 0.5, loader)
    with pytest.raises(ValueError, match="tolerance: got 0"):
        set_budget(model, 0.5, loader, tolerance=0)
    with pytest.raises(ValueError, match="router logits are not finite"):
        set_budget(model, 0.5, [torch.full((1, 3, 32, 32), float("nan"))])
    set_fixed_queries(model, 0.5)
    with pytest.raises(ValueError, match="its queries are fixed; expected dynamic ones"):
        set_budget(model, 0.5, loader)
