"""Parity with the reference implementation, on the recorded sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_weights
import pytest
import timm
import torch
from golden import Golden
from reference_complexity import layer_complexity, pyramid_layer_complexity

from dge_models import DGEPyramidVisionTransformer, DGEVisionTransformer, count_macs, load_checkpoint, trace
from dge_models.routed import routed_blocks


@pytest.fixture(scope="module")
def loaded(golden_dge: Golden, tmp_path_factory: pytest.TempPathFactory) -> DGEVisionTransformer:
    path = golden_dge.save(tmp_path_factory.mktemp("golden") / "reference.pth")
    model = timm.create_model(golden_dge.model).eval()
    load_checkpoint(model, path)
    return model


@pytest.fixture(scope="module")
def pyramid(golden_pvt: Golden, tmp_path_factory: pytest.TempPathFactory) -> DGEPyramidVisionTransformer:
    path = golden_pvt.save(tmp_path_factory.mktemp("golden") / "reference.pth")
    model = timm.create_model(golden_pvt.model).eval()
    load_checkpoint(model, path)
    return model


@pytest.mark.parametrize("case", ["golden_dge", "golden_dense", "golden_dpvt", "golden_pvt"])
def test_weights_and_input_are_the_recorded_ones(case: str, request: pytest.FixtureRequest) -> None:
    golden: Golden = request.getfixturevalue(case)
    assert golden_weights.checksum(golden.weights) == golden.meta["weights_sha256"]
    assert golden.images.double().abs().sum().item() == pytest.approx(golden.meta["image_abs_sum"], rel=1e-9)


def test_dense_model_logits(golden_dense: Golden, tmp_path: Path) -> None:
    model = timm.create_model(golden_dense.model).eval()
    load_checkpoint(model, golden_dense.save(tmp_path / "reference.pth"))
    with torch.no_grad():
        logits = model(golden_dense.images)
    torch.testing.assert_close(logits, golden_dense.tensor("logits"), atol=5e-5, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_logits_and_features(golden_dge: Golden, loaded: DGEVisionTransformer, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        logits = loaded(golden_dge.images)
        features = loaded.forward_features(golden_dge.images)
    torch.testing.assert_close(logits.detach(), golden_dge.tensor("logits"), atol=5e-5, rtol=0)
    torch.testing.assert_close(features.detach(), golden_dge.tensor("features"), atol=5e-5, rtol=0)


def test_every_split_and_query_count(golden_dge: Golden, loaded: DGEVisionTransformer) -> None:
    result = trace(loaded, golden_dge.images)
    assert len(result.granularity) == 12
    for layer, chosen in enumerate(result.granularity):
        assert torch.equal(chosen, golden_dge.tensor(f"gran_{layer:02d}"))
    assert torch.equal(result.queries, golden_dge.tensor("num_queries").long())


def test_gate_logits(golden_dge: Golden, loaded: DGEVisionTransformer) -> None:
    with torch.no_grad():
        tokens, grid, _ = loaded._embed(golden_dge.images)
        for layer, block in enumerate(loaded.blocks):
            expected = golden_dge.tensor(f"gate_{layer:02d}")
            logits = block.router.logits(tokens, grid, loaded.num_prefix_tokens)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            tokens = block(tokens, grid, loaded.num_prefix_tokens)


def test_complexity_of_the_recorded_layers(golden_dge: Golden, loaded: DGEVisionTransformer) -> None:
    queries = trace(loaded, golden_dge.images).queries.double()
    sizes = {"tokens": 257, "width": 192, "heads": 3, "hidden_ratio": 4, "regions": 257 / 16, "splits": 3}
    for name, counted in (("dynamic", queries), ("static", torch.full_like(queries, 257))):
        expected = golden_dge.tensor(f"comp_layers_{name}")
        torch.testing.assert_close(layer_complexity(counted, **sizes), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_pyramid_logits(golden_pvt: Golden, pyramid: DGEPyramidVisionTransformer, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        logits = pyramid(golden_pvt.images)
    torch.testing.assert_close(logits.detach(), golden_pvt.tensor("logits"), atol=5e-5, rtol=0)


def test_pyramid_splits_query_counts_and_gate_logits(golden_pvt: Golden, pyramid: DGEPyramidVisionTransformer) -> None:
    gates: list[torch.Tensor] = []

    def record(block: Any, args: tuple[Any, ...]) -> None:
        gates.append(block.router.logits(*args[:3]))

    hooks = [block.register_forward_pre_hook(record) for block in routed_blocks(pyramid)]
    result = trace(pyramid, golden_pvt.images)
    for hook in hooks:
        hook.remove()
    assert len(result.granularity) == len(gates) == 8
    for layer, (chosen, logits) in enumerate(zip(result.granularity, gates, strict=True)):
        assert torch.equal(chosen, golden_pvt.tensor(f"gran_{layer:02d}"))
        torch.testing.assert_close(logits, golden_pvt.tensor(f"gate_{layer:02d}"), atol=1e-4, rtol=0)
    assert torch.equal(result.queries, golden_pvt.tensor("num_queries").long())


def test_pyramid_complexity_of_the_recorded_layers(golden_pvt: Golden, pyramid: DGEPyramidVisionTransformer) -> None:
    """The recorded numbers by the reference's formula; ours differ from it by its known slips alone."""
    result = trace(pyramid, golden_pvt.images)
    ours = count_macs(pyramid, golden_pvt.images)
    sizes = [
        {"tokens": tokens, "width": width, "heads": heads, "hidden_ratio": ratio, "reduction": reduction, "splits": 3}
        for tokens, width, heads, ratio, reduction in (
            (4096, 64, 1, 8, 8),
            (1024, 128, 2, 8, 4),
            (256, 320, 5, 4, 2),
            (65, 512, 8, 4, 1),
        )
        for _ in range(2)
    ]
    for layer, size in enumerate(sizes):
        queries = result.queries[layer].double()
        keys = size["tokens"] / size["reduction"] ** 2
        for name, counted, own in (
            ("dynamic", queries, ours.layers[layer]),
            ("static", torch.full_like(queries, size["tokens"]), ours.static_layers[layer].expand(2)),
        ):
            expected = golden_pvt.tensor(f"comp_layers_{name}")[layer]
            torch.testing.assert_close(pyramid_layer_complexity(counted, **size), expected, rtol=1e-9, atol=0)
            second_product = counted * keys * size["width"]
            second_norm = (size["tokens"] - counted) * size["width"]
            regions = (size["tokens"] / 16 - size["tokens"] // 16) * size["width"] * 4
            torch.testing.assert_close(own, expected + second_product - second_norm - regions, rtol=1e-9, atol=0)
