from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL, Build, small_config
from timm.models import create_feature_extractor
from torch import nn

from dge_models import count_macs, find_routed, set_budget, set_fixed_queries, trace
from dge_models.finding import find_model


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"backbone": backbone})


def test_a_model_is_found_inside_what_holds_it(small: Build) -> None:
    model = small()
    optimized = torch._dynamo.OptimizedModule(model, torch._dynamo.disable)
    for module in (model, nn.Sequential(model), Detector(nn.DataParallel(model)), optimized):
        assert find_routed(module) is model
        assert find_model(module) is model


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"])
def test_tools_work_on_feature_extractors(name: str) -> None:
    settings = small_config(name)
    features = timm.create_model(name, features_only=True, out_indices=(0, 1), **settings).eval()
    model: Any = find_routed(features)
    images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    result = trace(features, images)
    routed = len(model.blocks) if name.startswith("deit") else sum(len(stage.blocks) for stage in model.stages)
    assert len(result.granularity) == routed
    assert torch.equal(count_macs(nn.Sequential(features), images).total, result.macs)
    assert set_budget(Detector(features), 1.0, [images]).ratio == 1.0
    setting = set_fixed_queries(features, 0.9)
    torch.testing.assert_close(
        count_macs(features, images).total / result.static_macs, torch.full((2,), setting.ratio, dtype=torch.float64)
    )


def test_plain_models_are_counted_inside_what_holds_them() -> None:
    plain, images = timm.create_model("deit_tiny_patch16_256", **SMALL), torch.randn(1, 3, 32, 32)
    assert count_macs(Detector(plain), images).static_total == count_macs(plain, images).static_total


def test_errors_say_what_was_looked_for(small: Build) -> None:
    model = small()
    two = nn.ModuleDict({"left": model, "right": copy.deepcopy(model)})
    with pytest.raises(ValueError, match=r"got ModuleDict; expected one model with routed blocks .* 2: left, right"):
        find_routed(two)
    with pytest.raises(ValueError, match="holds 2"):
        find_model(two)
    with pytest.raises(ValueError, match=r"got Detector; .*Detector has no routed block; looked at all 4 modules"):
        find_routed(Detector(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"got DGEVisionTransformer; .* none of its blocks is routed"):
        find_routed(small(layers=[]))
    with pytest.raises(ValueError, match=r"holds the blocks alone \(as graphs"):
        find_routed(create_feature_extractor(model, ["head"]))
    with pytest.raises(ValueError, match=r"got Linear; expected a vision transformer or pyramid, .*none of the 1 mod"):
        count_macs(nn.Linear(2, 2), torch.randn(1, 3, 32, 32))
