from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL_PYRAMID, Build
from torch import nn

from dge_models import (
    BudgetLoss,
    DeformablePyramidVisionTransformer,
    DGEDeformablePyramidVisionTransformer,
    collect_routings,
    count_macs,
    deterministic_routing,
    mac_ratio,
    set_budget,
    set_fixed_queries,
    set_training_mode,
    trace,
)
from dge_models.routed import routed_blocks
from dge_models.router import gumbel_noise

DGE, PLAIN = "dpvt_dge_s124_tiny_256", "dpvt_tiny_256"
SHAPES = [(4, 4), (2, 2), (2, 2), (1, 1), (1, 1)]  # regions of each routed block at 64 pixels


def _images(batch: int = 2, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(batch, 3, *size)


@pytest.mark.parametrize("size", [(64, 64), (56, 56), (32, 32), (75, 110)])
@pytest.mark.parametrize("mode", ["dense", "sparse", "eval", "inference"])
def test_any_size_forwards_and_backwards(small: Build, size: tuple[int, int], mode: str) -> None:
    """32 pixels give a last grid of one token; 56 give grids of 14, 7, 3 and 1."""
    model = small(DGE)
    if mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
    with torch.set_grad_enabled(mode != "inference"):
        logits, routings = model.forward_routed(_images(size=size))
    assert logits.shape == (2, 7)
    assert [routing.grid for routing in routings] == [
        (size[0] // stride, size[1] // stride) for stride in (4, 8, 8, 16, 32)
    ]
    assert {routing.num_prefix_tokens for routing in routings} == {0}
    if mode != "inference":
        (logits.square().sum() + sum(routing.queries.sum() for routing in routings)).backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_evaluation_is_the_same_with_and_without_gradients(small: Build) -> None:
    model, images = small(DGE), _images(4)
    with torch.no_grad():
        fast, fast_routings = model.forward_routed(images)
    slow, routings = model.forward_routed(images)
    torch.testing.assert_close(slow, fast, atol=1e-5, rtol=0)
    assert all(torch.equal(a.choice, b.choice) for a, b in zip(fast_routings, routings, strict=True))
    assert len(torch.cat([routing.choice.flatten() for routing in routings]).unique()) == 3


def test_training_modes_agree_for_given_noise(small: Build) -> None:
    model, images = small(DGE).train(), _images()
    noise = [gumbel_noise((2, *shape, 3), images.device) for shape in SHAPES]
    results = []
    for mode in ("dense", "sparse"):
        set_training_mode(model, mode)  # type: ignore[arg-type]
        model.zero_grad()
        logits, _ = model.forward_routed(images, noise=noise)
        nn.functional.cross_entropy(logits, torch.arange(2)).backward()
        results.append((logits.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    behind = [name for name in results[0][1] if name.startswith(("head.", "norm.", "stages.3.blocks.0."))]
    for name in behind:
        if "router" not in name:
            torch.testing.assert_close(results[0][1][name], results[1][1][name], atol=1e-5, rtol=1e-3)


def test_a_routed_model_at_its_finest_is_the_plain_one(small: Build) -> None:
    plain, routed = small(PLAIN), small(DGE)
    routed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for block in routed_blocks(routed):
            block.router.gate.weight.zero_()
            block.router.gate.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    images = _images(size=(56, 72))
    torch.testing.assert_close(routed(images), plain(images))
    with torch.no_grad():
        torch.testing.assert_close(routed(images), plain(images))


def test_deterministic_training_equals_evaluation(small: Build) -> None:
    model, images = small(DGE), _images(4)
    expected = model(images)
    for mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
        with deterministic_routing():
            torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradient_checkpointing_changes_nothing(small: Build, mode: str) -> None:
    model, images = small(DGE).train(), _images()
    set_training_mode(model, mode)  # type: ignore[arg-type]
    results = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        logits, routings = model.forward_routed(images)
        (logits.square().sum() + routings[1].queries.sum()).backward()
        results.append([logits.detach(), *(value.grad.clone() for value in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_training_step_with_a_budget_moves_the_routers(small: Build) -> None:
    model = small(DGE).train()
    detector = nn.Sequential(model)
    with collect_routings(detector) as collected:
        logits = detector(_images())
    assert len(collected.routings) == 5
    (logits.square().mean() + BudgetLoss(target=0.5)(model, collected.routings)).backward()
    before = [block.router.gate.bias.clone() for block in routed_blocks(model)]
    torch.optim.SGD(model.parameters(), 0.1).step()
    for block, bias in zip(routed_blocks(model), before, strict=True):
        assert not torch.equal(block.router.gate.bias, bias)


def test_a_budget_is_set_without_training(small: Build) -> None:
    model, images = small(DGE), _images(8)
    setting = set_budget(model, 0.6, [images])
    routings = model.forward_routed(images)[1]
    assert mac_ratio(model, routings).mean().item() == pytest.approx(setting.ratio, abs=1e-3)
    assert setting.ratio == pytest.approx(0.6, abs=0.1)


def test_fixed_queries_at_the_choices_counts_compute_the_same(small: Build) -> None:
    model, image = small(DGE), _images(1, (56, 72))
    with torch.no_grad():
        expected, routings = model.forward_routed(image)
        counts = [tuple(routing.choice.flatten().bincount(minlength=3).tolist()) for routing in routings]
        set_fixed_queries(model, counts, image_size=(56, 72))
        torch.testing.assert_close(model(image), expected)


def test_exported_with_fixed_queries_it_samples_by_what_onnx_has(small: Build) -> None:
    model, images = small(DGE), _images(2)
    set_fixed_queries(model, 0.6)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not any("embedding_bag" in target or "dge_kernels" in target for target in called)
        assert "aten.grid_sampler.default" in called
        torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-5)


def test_a_trace_counts_what_was_computed(small: Build) -> None:
    model, images = small(DGE), _images(3)
    result, count = trace(model, images), count_macs(model, images)
    assert [tuple(part.shape[1:]) for part in result.granularity] == SHAPES
    torch.testing.assert_close(result.macs.double(), count.total, rtol=1e-6, atol=0)
    assert (count.total < count.static_total).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_types_run(small: Build, dtype: torch.dtype) -> None:
    model = small(DGE).to(dtype)
    with torch.no_grad():
        assert model(_images(size=(56, 72)).to(dtype)).dtype == dtype


def test_autocast_keeps_the_gradients_finite(small: Build) -> None:
    model, images = small(DGE), _images(4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    torch.testing.assert_close(logits.float(), model(images), atol=0.2, rtol=0.1)
    for mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().sum().backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("mode", ["dense", "sparse", "eval"])
def test_an_empty_batch_gives_empty_logits(small: Build, mode: str) -> None:
    model = small(DGE)
    if mode != "eval":
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
    assert model(_images(0)).shape == (0, 7)
    with torch.no_grad():
        assert model(_images(0)).shape == (0, 7)


def test_an_image_does_not_see_the_others(small: Build) -> None:
    model, images = small(DGE), _images(5)
    with torch.no_grad():
        alone = torch.cat([model(image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(model(images), alone, atol=1e-6, rtol=0)


def test_options_reach_the_blocks(small: Build) -> None:
    model = small(DGE, num_points=2, offset_gradient=1.0, splits=(2, 1))
    assert type(model) is DGEDeformablePyramidVisionTransformer
    assert {(b.attn.num_points, b.attn.offset_gradient, b.router.splits) for b in routed_blocks(model)} == {
        (2, 1.0, (2, 1))
    }
    assert {block.attn.offset_gradient for block in routed_blocks(small(DGE))} == {0.1}
    plain = small(PLAIN, attn_drop_rate=0.3, proj_drop_rate=0.2)
    assert type(plain) is DeformablePyramidVisionTransformer
    assert (plain.stages[1].blocks[0].attn.attn_drop.p, plain.stages[1].blocks[0].attn.proj_drop.p) == (0.3, 0.2)
    plain.train()(_images()).sum().backward()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"attn_drop_rate": 0.1}, r"stages\.0\.blocks\.0\.attn: attention dropout is 0\.1"),
        ({"img_size": 31}, r"img_size: got \(31, 31\); expected at least 32 pixels"),
        ({"global_pool": "token"}, "global_pool: got 'token'; expected another pooling, the model has no class token"),
        ({"depths": (1, 1)}, r"depths, num_heads, mlp_ratios: got \[4, 4, 2, 4, 4\] entries; expected one per stage"),
        ({"num_heads": (3, 2, 3, 4)}, "num_heads: got 3; expected a divisor of the width, 8"),
        ({"num_points": 0}, "num_points: got 0; expected at least 1"),
    ],
)
def test_bad_options_are_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        timm.create_model(DGE, **{**SMALL_PYRAMID, **kwargs})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}])
def test_plain_models_are_scripted_and_saved(small: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small(PLAIN, **changes)
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    scripted = torch.jit.load(tmp_path / "scripted.pt")
    with torch.no_grad():
        for size in ((64, 64), (75, 110)):
            images = _images(size=size)
            torch.testing.assert_close(scripted(images), model(images))
