from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL_PYRAMID, Build
from torch import nn

from dge_models import BudgetLoss, DGEPyramidVisionTransformer, deterministic_routing, set_training_mode, trace
from dge_models.encoder import DGEBlock
from dge_models.routed import routed_blocks
from dge_models.router import gumbel_noise

DGE, PLAIN = "pvt_dge_s124_tiny_256", "pvt_tiny_256"
SHAPES = [(4, 4), (2, 2), (2, 2), (1, 1), (1, 1)]  # regions of each routed block at 64 pixels


def _images(batch: int = 2, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(batch, 3, *size)


@pytest.mark.parametrize("size", [(64, 64), (56, 56), (32, 32), (75, 110)])
@pytest.mark.parametrize("mode", ["dense", "sparse", "eval", "inference"])
def test_any_size_forwards_and_backwards(small: Build, size: tuple[int, int], mode: str) -> None:
    """56 pixels give grids of 14, 7, 3 and 1, as 224 give 56 to 7: no multiples of 4."""
    model = small(DGE)
    if mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
    with torch.set_grad_enabled(mode != "inference"):
        logits, routings = model.forward_routed(_images(size=size))
    assert logits.shape == (2, 7)
    grids = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 8, 16, 32)]
    assert [routing.grid for routing in routings] == grids
    assert [routing.choice.shape[1:] for routing in routings] == [(-(-h // 4), -(-w // 4)) for h, w in grids]
    assert [routing.num_prefix_tokens for routing in routings] == [0, 0, 0, 0, 1]
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
        logits, routings = model.forward_routed(images, noise=noise)
        nn.functional.cross_entropy(logits, torch.arange(2)).backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        results.append((logits.detach(), [routing.choice for routing in routings], gradients))
    (dense, dense_choice, dense_gradients), (sparse, sparse_choice, sparse_gradients) = results
    torch.testing.assert_close(dense, sparse, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(dense_choice, sparse_choice, strict=True))
    # The routers' gradients differ by design, and reach what lies before them.
    behind = [name for name in dense_gradients if name.startswith(("head.", "norm.", "stages.3.blocks.0."))]
    for name in behind:
        if "router" not in name:
            torch.testing.assert_close(dense_gradients[name], sparse_gradients[name], atol=1e-5, rtol=1e-3)


def test_noise_must_fit_the_blocks(small: Build) -> None:
    model = small(DGE).train()
    with pytest.raises(ValueError, match="noise: got 1 tensors; expected one per routed block, 5"):
        model(_images(), noise=[torch.zeros(2, 4, 4, 3)])
    with pytest.raises(ValueError, match=r"noise: got shape \(2, 4, 4, 3\); expected \(2, 2, 2, 3\)"):
        model(_images(), noise=[torch.zeros(2, 4, 4, 3)] * 5)


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
    assert not torch.equal(model(images), model(images))


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


@pytest.mark.parametrize("name", [DGE, PLAIN])
def test_gradient_checkpointing_computes_every_block_again(small: Build, name: str) -> None:
    model, calls = small(name).train(), []
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block in blocks:
        block.norm2.register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled, times in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enabled)
        calls.clear()
        model(_images()).sum().backward()
        assert len(calls) == times * len(blocks)


@pytest.mark.parametrize("drop", ["query", "image"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_drop_path_grows_to_its_rate_and_trains(small: Build, drop: str, mode: str) -> None:
    model = small(DGE, drop_path_rate=0.4, drop_path_mode=drop, training_mode=mode).train()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in routed_blocks(model)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert {block.drop_path_mode for block in routed_blocks(model)} == {drop}
    with deterministic_routing():
        assert not torch.equal(model(_images(8)), model.eval()(_images(8)))
    model.train()(_images(8)).sum().backward()


def test_autocast_keeps_the_gates_in_float32(small: Build) -> None:
    model, images = small(DGE), _images(4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routings = model.forward_routed(images)
    torch.testing.assert_close(logits.float(), model(images), atol=0.2, rtol=0.1)
    assert {routing.gate.dtype for routing in routings} == {torch.float32}
    for mode in ("dense", "sparse"):
        set_training_mode(model.train(), mode)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().sum().backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_types_run(small: Build, dtype: torch.dtype) -> None:
    model = small(DGE).to(dtype)
    with torch.no_grad():
        assert model(_images(size=(56, 72)).to(dtype)).dtype == dtype


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


def test_a_training_step_with_a_budget_moves_the_routers(small: Build) -> None:
    model = small(DGE).train()
    logits, routings = model.forward_routed(_images())
    (logits.square().mean() + BudgetLoss(target=0.5)(model, routings)).backward()
    before = [block.router.gate.bias.clone() for block in routed_blocks(model)]
    torch.optim.SGD(model.parameters(), 0.1).step()
    for block, bias in zip(routed_blocks(model), before, strict=True):
        assert not torch.equal(block.router.gate.bias, bias)


def test_every_block_routes_with_the_given_splits(small: Build) -> None:
    model = small(DGE, splits=(2, 1))
    assert type(model) is DGEPyramidVisionTransformer
    assert all(isinstance(block, DGEBlock) for stage in model.stages for block in stage.blocks)
    assert trace(model, _images()).granularity[0].shape == (2, 8, 8)


def test_other_numbers_of_stages(small: Build) -> None:
    three = {key: SMALL_PYRAMID[key][1:] for key in ("embed_dims", "depths", "num_heads", "mlp_ratios")}
    model = small(DGE, **three, patch_sizes=(4, 2, 2), sr_ratios=(4, 2, 1))
    assert model.feature_info[-1]["reduction"] == 16
    assert model(_images(size=(16, 40))).shape == (2, 7)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"training_mode": "slow"}, "training_mode: got 'slow'"),
        ({"splits": (6, 4)}, r"splits: got \(6, 4\)"),
        ({"attn_drop_rate": 0.1}, r"stages\.0\.blocks\.0\.attn: attention dropout is 0\.1"),
        ({"img_size": 31}, r"img_size: got \(31, 31\); expected at least 32 pixels"),
        ({"global_pool": "map"}, "global_pool: got 'map'; expected one of"),
        ({"class_token": False}, "global_pool: got 'token'; expected another pooling"),
        ({"sr_ratios": (8, 4, 2, 2)}, r"sr_ratios: got \(8, 4, 2, 2\); expected 1 last"),
        ({"depths": (1, 1)}, r"got \[4, 4, 2, 4, 4, 4\] entries; expected one per stage"),
    ],
)
def test_bad_options_are_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        timm.create_model(DGE, **{**SMALL_PYRAMID, **kwargs})


@pytest.mark.parametrize("name", [DGE, PLAIN])
def test_bad_images_are_refused(small: Build, name: str) -> None:
    with pytest.raises(ValueError, match=r"images: got shape \(3, 64, 64\); expected \[B, C, H, W\]"):
        small(name)(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="images: got 64 × 31 pixels; expected at least 32 × 32"):
        small(name)(_images(size=(64, 31)))
    with pytest.raises(ValueError, match=r"images: got 32 × 64 pixels; expected 64 × 64 \(dynamic_img_size is off\)"):
        small(name, dynamic_img_size=False)(_images(size=(32, 64)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg", "class_token": False}, {"num_classes": 0}])
def test_plain_pyramids_are_scripted_and_saved(small: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small(PLAIN, **changes)
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    scripted = torch.jit.load(tmp_path / "scripted.pt")
    with torch.no_grad():
        for size in ((64, 64), (75, 110)):
            images = _images(size=size)
            torch.testing.assert_close(scripted(images), model(images))
    with pytest.raises(torch.jit.Error, match="fewer pixels per side"):
        scripted(_images(size=(16, 64)))
