"""Images of many sizes leave nothing behind: what depends on a size is computed anew, or kept with a bound."""

from __future__ import annotations

import functools
import gc
import importlib
import pkgutil
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL_PYRAMID, scatter_routing

import dge_models
from dge_models import from_timm, padded
from dge_models.position_cache import MOST_SIZES

VIT: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True}


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("name", ["pvt_dge_s124_tiny_256", "vit_small_patch16_224", "vit_small_patch16_dinov3"])
def test_more_sizes_keep_no_more_tensors(name: str) -> None:
    pyramid = "pvt" in name
    model = timm.create_model(name, **(SMALL_PYRAMID if pyramid else VIT))
    model = scatter_routing(model if pyramid else from_timm(model)).eval()

    def run(size: int) -> None:
        images = torch.zeros(2, 3, 160, size)
        with torch.no_grad():
            model(images)
            with padded(model, [(160, size), (100, size - 16)]):
                model(images)

    for index in range(MOST_SIZES + 1):
        run(64 + 16 * index)
    before = _live_tensors()
    for index in range(MOST_SIZES + 1, MOST_SIZES + 6):
        run(64 + 16 * index)
    assert _live_tensors() == before


def test_every_cache_has_a_bound() -> None:
    found = []
    for module in pkgutil.iter_modules(dge_models.__path__, "dge_models."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, functools._lru_cache_wrapper):
                found.append(name)
                assert value.cache_parameters()["maxsize"] is not None, f"{module.name}.{name}"
    assert "_most_queries" in found
