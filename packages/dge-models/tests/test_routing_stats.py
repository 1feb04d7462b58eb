from __future__ import annotations

import pytest
import torch
from small_models import Build

from dge_models import count_macs
from dge_models.routing_stats import observe
from dge_models.vit import routed_blocks


def test_it_sees_what_the_model_does(small: Build) -> None:
    model, images = small(), torch.randn(12, 3, 32, 32)
    seen = observe(model, [images[:8], images[8:]])
    count = count_macs(model, images)
    assert seen.images == 12
    assert seen.ratio == pytest.approx((count.total / count.static_total).mean().item(), abs=1e-6)
    routings = model.forward_routed(images)[1]
    for layer, routing in enumerate(routings):
        logits = torch.cat([seen.layers[layer].logits, seen.layers[layer + 3].logits])
        assert torch.equal(logits.argmax(-1), routing.choice.long())
        assert seen.choices[layer].tolist() == routing.choice.flatten().bincount(minlength=3).tolist()
    assert all(not block._forward_pre_hooks for block in routed_blocks(model))


def test_prediction_is_exact_where_no_earlier_block_routes(small: Build) -> None:
    model, images = small(layers=[2]), torch.randn(12, 3, 32, 32)
    seen = observe(model, [images])
    assert seen.predict(0.0) == seen.ratio
    for change in (-6.0, -1.5, 2.5):
        block = routed_blocks(model)[0]
        bias = block.router.gate.bias.detach().clone()
        with torch.no_grad():
            block.router.gate.bias += change * torch.tensor([1.0, 0.25, 0.0625])
        assert observe(model, [images]).ratio == pytest.approx(seen.predict(change), abs=1e-6)
        assert seen.predict(change) != seen.ratio
        with torch.no_grad():
            block.router.gate.bias.copy_(bias)
    assert seen.predict(seen.spread()) == pytest.approx(1.0, abs=1e-6)
    assert seen.predict(-seen.spread()) == pytest.approx(seen.cheapest, abs=1e-6)
