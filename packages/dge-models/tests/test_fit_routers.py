from __future__ import annotations

import copy
import itertools
import math
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from small_models import Build
from torch import Tensor

from dge_models import count_macs, fit_routers, from_timm, set_budget, set_fixed_queries
from dge_models.eva import DGEEva
from dge_models.routed import routed_blocks
from dge_models.router import split_costs
from dge_models.split_damage import LayerDamage

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def pictures(count: int = 16, seed: int = 0, size: int = 32) -> Tensor:
    """Blocks of 8 × 8 pixels, some flat and some with texture, as regions of photographs are."""
    generator = torch.Generator().manual_seed(seed)
    cells = -(-size // 8)

    def of_cells(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, cells, cells, generator=generator)
        return F.interpolate(drawn, scale_factor=8.0)[..., :size, :size]

    texture = torch.randn(count, 3, size, size, generator=generator)
    return of_cells(count, 3) + texture * (of_cells(count, 1) > 0) * 2


def plain(**kwargs: Any) -> Any:
    """A ViT whose blocks matter; timm's weights at initialisation do next to nothing."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZES, "num_classes": 0, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("blocks") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def error(model: Any, dense: Any, images: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model.forward_features(images), dense.forward_features(images)
    return 1 - F.cosine_similarity(ours, theirs, dim=-1)[:, 1:].mean().item()


def evaluated_ratio(model: Any, images: Tensor) -> float:
    counts = count_macs(model, images)
    return (counts.total / counts.static_total).mean().item()


@pytest.mark.parametrize(("splits", "ratio"), [((2, 1), 0.75), ((4, 2, 1), 0.75), ((4, 2, 1), 0.5)])
def test_held_out_pictures_lose_less_than_by_chance(splits: tuple[int, ...], ratio: float) -> None:
    dense, loader, held_out = plain(), list(pictures(24).split(12)), pictures(16, seed=1)
    fitted = from_timm(dense, splits=splits)
    fit = fit_routers(fitted, loader, ratio)
    assert fit.setting.ratio == pytest.approx(ratio, abs=0.02)
    assert fit.setting.ratio == pytest.approx(evaluated_ratio(fitted, torch.cat(loader)), abs=1e-6)
    by_chance = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        random = from_timm(dense, splits=splits)
        for block in routed_blocks(random):
            with torch.no_grad():
                block.router.gate.weight.copy_(torch.randn(block.router.gate.weight.shape, generator=generator))
        set_budget(random, ratio, [held_out])
        by_chance.append(error(random, dense, held_out))
    set_budget(fitted, ratio, [held_out])
    assert error(fitted, dense, held_out) < 0.9 * min(by_chance)


def test_logits_of_neighbouring_splits_differ_by_cost_times_the_value_that_was_fitted() -> None:
    """Of a block whose damage is the same everywhere but for its cost: no weights, and a bias that can be told."""
    model, loader = from_timm(plain(), splits=(4, 2, 1)), [pictures()]

    def constant(model: Any, images: Tensor, *args: Any) -> Any:
        means = torch.randn(50, 32, dtype=torch.float64)
        moved = torch.tensor([0.1, 0.2], dtype=torch.float64).view(1, 2, 1).expand(50, 2, 3)
        return [LayerDamage(means, moved, torch.tensor([[0.03, 0.01]]).double().expand(50, 2)) for _ in range(3)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dge_models.fit_routers"], "measure_damage", constant)
        fit = fit_routers(model, loader, 1.0)
    costs = split_costs((4, 2, 1))
    for block in model.blocks:
        assert block.router.gate.weight.abs().max() < 1e-6
        bias = block.router.gate.bias - fit.setting.shift * costs
        values = (bias[:-1] - bias[1:]) / (costs[:-1] - costs[1:])
        torch.testing.assert_close(
            values, torch.tensor([math.log(0.01 / 0.03), math.log(0.04 / 0.01)]), rtol=1e-3, atol=0
        )
    assert fit.regions == (100, 100, 100)  # two times eight images


def test_damage_that_cannot_be_foreseen_counts_by_its_mean() -> None:
    """Log-normal, whatever the region's mean token is: the mean is more than the exponential of the mean logarithm."""
    model, generator = from_timm(plain(), splits=(2, 1)), torch.Generator().manual_seed(0)
    spreads = iter([0.0, 1.0, 2.0] * 2)

    def noisy(model: Any, images: Tensor, *args: Any) -> Any:
        layers = []
        for spread in itertools.islice(spreads, 3):
            means = torch.randn(5000, 32, generator=generator, dtype=torch.float64)
            logarithms = spread * torch.randn(5000, 1, 1, generator=generator, dtype=torch.float64)
            moved = (0.5 * logarithms).exp().expand(5000, 1, 3)
            layers.append(LayerDamage(means, moved, torch.ones(5000, 1).double()))
        return layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dge_models.fit_routers"], "measure_damage", noisy)
        fit = fit_routers(model, [pictures()], 1.0)
    values = []
    for block in model.blocks:
        bias = block.router.gate.bias - fit.setting.shift * split_costs((2, 1))
        values.append((bias[0] - bias[1]).item() / 0.75)
    assert [value - values[0] for value in values] == pytest.approx([0.0, 0.5, 2.0], abs=0.1)


def test_the_budget_may_be_set_on_other_pictures() -> None:
    dense, loader, others = plain(), [pictures()], [pictures(12, seed=5) * 0.3]
    model, alike = (from_timm(dense, splits=(2, 1)) for _ in range(2))
    fit = fit_routers(model, loader, 0.7, calibration=others, projections=2)
    fit_routers(alike, loader, 0.7, projections=2)
    assert (fit.images, fit.setting.images) == (16, 12)
    assert evaluated_ratio(model, others[0]) == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(model.blocks[1].router.gate.weight, alike.blocks[1].router.gate.weight)
    assert abs(evaluated_ratio(alike, others[0]) - 0.7) > 0.02


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 7},
        {"num_classes": 7, "global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"reg_tokens": 2},
        {"img_size": 28},
    ],
)
def test_kinds_of_models(kwargs: dict[str, Any]) -> None:
    images = pictures(12, size=kwargs.get("img_size", 32))
    model = from_timm(plain(**kwargs), splits=(4, 2, 1))
    fit = fit_routers(model, [(images, torch.zeros(12))], 0.6, projections=2)
    assert evaluated_ratio(model, images) == pytest.approx(0.6, abs=0.02)
    assert (fit.images, fit.regions) == (12, (48, 48, 48))


def test_some_layers_route() -> None:
    model, images = from_timm(plain(), splits=(2, 1), layers=[0, 2]), pictures(12)
    fit = fit_routers(model, [images], 0.8, projections=2)
    assert [len(each) for each in fit.explained] == [1, 1]
    assert evaluated_ratio(model, images) == pytest.approx(0.8, abs=0.02)


def test_registered_names_rotary_models_and_pyramids(small: Build) -> None:
    rotary = timm.create_model("eva02_tiny_patch14_224", **{**SIZES, "num_classes": 5}).eval()
    for model, size in ((small(), 32), (from_timm(rotary), 32), (small("pvt_dge_s124_tiny_256"), 64)):
        images = pictures(12, size=size)
        fit = fit_routers(model, [images], 0.6, projections=2)
        assert fit.setting.ratio == pytest.approx(0.6, abs=0.02)
    assert isinstance(from_timm(rotary), DGEEva)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = from_timm(plain(), splits=(2, 1)).to(dtype)
    images = pictures(12).to(dtype)
    fit_routers(model, [images], 0.7, projections=2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert evaluated_ratio(model, images) == pytest.approx(0.7, abs=0.02)


def test_where_only_the_class_token_is_read_the_last_block_is_coarse() -> None:
    images = pictures(12)
    for reads, coarse in (("class", True), ("tokens", False), (None, False)):
        model = from_timm(plain(global_pool="token"), splits=(2, 1))
        fit = fit_routers(model, [images], 0.8, reads=reads, projections=2)  # type: ignore[arg-type]
        assert math.isnan(fit.explained[-1][0]) is coarse
        with torch.no_grad():
            choice = model.forward_routed(images)[1][-1].choice
        assert bool((choice == 1).all()) is coarse
    classifier = from_timm(plain(num_classes=7), splits=(2, 1))
    assert math.isnan(fit_routers(classifier, [images], 0.8, projections=2).explained[-1][0])


def test_only_routers_change_and_nothing_is_left_behind() -> None:
    model = from_timm(plain(), splits=(2, 1)).train()
    model.blocks[1].eval()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    fit_routers(model, [pictures()], 0.7, projections=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is ("router" not in name), name
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_decides_and_the_loader_is_read_up_to_a_limit() -> None:
    dense, images = plain(), pictures(12)

    def weights(**kwargs: Any) -> tuple[Tensor, int]:
        model = from_timm(dense, splits=(2, 1))
        fit = fit_routers(model, list(images.split(5)), 0.7, projections=2, **kwargs)
        return model.blocks[1].router.gate.weight.detach(), fit.images

    first, again, other, few = weights(), weights(), weights(seed=1), weights(max_images=7)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert (first[1], few[1]) == (12, 7)


def test_bad_input_is_refused_and_leaves_the_model_alone() -> None:
    model, loader = from_timm(plain(), splits=(2, 1)), [pictures(4)]
    before = copy.deepcopy(model.state_dict())
    for kwargs, message in [
        ({"projections": 0}, "projections: got 0; expected a positive integer"),
        ({"max_images": 2.0}, r"max_images: got 2\.0; expected a positive integer"),
        ({"reads": "patches"}, "reads: got 'patches'; expected one of 'class', 'tokens'"),
        ({"tolerance": 0}, "tolerance: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_routers(model, loader, 0.7, **kwargs)  # type: ignore[arg-type]
    for ratio, message in ((1.2, r"ratio: got 1\.2"), (0.1, r"ratio: got 0\.1; expected at least 0\.\d+")):
        with pytest.raises(ValueError, match=message):
            fit_routers(model, loader, ratio)
    with pytest.raises(TypeError, match=r"loader: got an iterator \(list_iterator\)"):
        fit_routers(model, iter(loader), 0.7)
    with pytest.raises(TypeError, match=r"calibration: got an iterator \(list_iterator\)"):
        fit_routers(model, loader, 0.7, calibration=iter(loader))
    with pytest.raises(ValueError, match="loader: got no images"):
        fit_routers(model, [], 0.7)
    with pytest.raises(TypeError, match="loader: got a batch of type dict"):
        fit_routers(model, [{"image": loader[0]}], 0.7)
    with pytest.raises(ValueError, match="not finite"):
        fit_routers(model, [loader[0] * math.nan], 0.7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="has no routed block"):
        fit_routers(plain(), loader, 0.7)
    with pytest.raises(ValueError, match="a single split; expected two or more"):
        fit_routers(from_timm(plain(), splits=(2,)), loader, 0.7)
    last = from_timm(plain(global_pool="token"), splits=(2, 1), layers=[-1])
    with pytest.raises(ValueError, match=r"reads: got 'class', on which no routed block's tokens have an influence"):
        fit_routers(last, loader, 0.95, reads="class")
    set_fixed_queries(model, 0.9)
    with pytest.raises(ValueError, match="queries are fixed"):
        fit_routers(model, loader, 0.7)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("change", ["pruned", "quantised"])
def test_gates_whose_weights_would_not_last_are_refused(change: str) -> None:
    routed: Any = from_timm(plain(), splits=(2, 1))
    if change == "pruned":
        torch.nn.utils.prune.l1_unstructured(routed.blocks[1].router.gate, "weight", 0.5)
    else:
        torch.ao.quantization.quantize_dynamic(routed, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(
        ValueError, match=r"model: a router's gate is a Linear without a weight of its own; expected one"
    ):
        fit_routers(routed, [pictures()], 0.8)
