from __future__ import annotations

import pytest
import torch
from small_models import NAMES, Build, build_small

from dge_models import RoutedModel, set_fixed_queries
from dge_models.routed import noise_per_block, routed_blocks


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" in name])
def test_models_with_routers_are_told_apart_by_one_class(name: str) -> None:
    model = build_small(name)
    assert isinstance(model, RoutedModel) == ("dge" in name)
    assert len(routed_blocks(model)) == (0 if "dge" not in name else 5 if "pvt" in name else 3)


def test_noise_is_handed_out_in_order() -> None:
    noise = [torch.zeros(1), torch.ones(1)]
    assert list(noise_per_block(noise, 2)) == noise
    assert list(noise_per_block(None, 3)) == [None] * 3
    with pytest.raises(ValueError, match="noise: got 2 tensors; expected one per routed block, 3"):
        noise_per_block(noise, 3)


def test_the_same_noise_is_the_same_routing(small: Build) -> None:
    for name in ("deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256"):
        model = small(name).train()
        images = torch.randn(2, 3, 64, 64) if "pvt" in name else torch.randn(2, 3, 32, 32)
        shapes = [routing.gate.shape for routing in model.forward_routed(images)[1]]
        noise = [torch.randn(shape) for shape in shapes]
        first, second = (model.forward_routed(images, noise=noise) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a.choice, b.choice) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_wants_fixed_queries(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"got a model with dynamic queries, .* use set_fixed_queries"):
        torch.jit.trace(model, images, check_trace=False)
    set_fixed_queries(model, 0.7)
    traced = torch.jit.trace(model, images, check_trace=False)
    other = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(traced(other), model(other))
