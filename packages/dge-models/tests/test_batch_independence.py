"""What a model says of an image doesn't depend on the images beside it.

Routing, pooling and attention treat each image by itself, bit for bit. The linear layers are one matrix product
over all queries, which the BLAS cuts into blocks by its size, so sums may be rounded in another order: differences
of about 1e-7 of the logits, as with timm's plain models.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import Build, scatter_routing

from dge_models import set_fixed_queries

PYRAMID: dict[str, Any] = {"img_size": 64, "embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "num_classes": 7}


def compare(model: Any, images: torch.Tensor) -> None:
    with torch.no_grad():
        together, routings = model.forward_routed(images)
        for index, image in enumerate(images.split(1)):
            alone, own = model.forward_routed(image)
            torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-6)
            assert all(torch.equal(a.choice[0], b.choice[index]) for a, b in zip(own, routings, strict=True))
        uneven = torch.cat([model(part) for part in images.split([3, images.shape[0] - 3])])
    torch.testing.assert_close(uneven, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"img_size": 28}, {"embed_dim": 192, "num_heads": 3, "img_size": 64}])
def test_images_do_not_affect_each_other(small: Build, kwargs: dict[str, Any]) -> None:
    size = kwargs.get("img_size", 32)
    compare(small(**kwargs), torch.randn(7, 3, size, size))


def test_images_do_not_affect_each_other_in_a_pyramid() -> None:
    model = scatter_routing(timm.create_model("pvt_dge_s124_tiny_256", **PYRAMID)).eval()
    compare(model, torch.randn(5, 3, 64, 64))


def test_images_do_not_affect_each_other_with_fixed_queries(small: Build) -> None:
    model = small()
    set_fixed_queries(model, 0.5)
    compare(model, torch.randn(5, 3, 32, 32))


def test_a_neighbour_of_another_kind_changes_nothing(small: Build) -> None:
    model, image = small(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        beside_noise = model(torch.cat([image, torch.randn(3, 3, 32, 32) * 100]))
        beside_black = model(torch.cat([image, torch.zeros(3, 3, 32, 32)]))
        beside_nan = model(torch.cat([image, torch.full((3, 3, 32, 32), float("nan"))]))
    torch.testing.assert_close(beside_noise[0], beside_black[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(beside_nan[0], beside_black[0], rtol=0, atol=1e-6)
