"""What an image gets doesn't depend on how much it was padded, for every family."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import SMALL_PYRAMID, scatter_routing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dge_models
from dge_models import (
    BudgetLoss,
    SimpleFeaturePyramid,
    cheapest_ratio,
    collect_routings,
    count_macs,
    deterministic_routing,
    from_timm,
    mac_ratio,
    merge_tokens,
    padded,
    set_fixed_queries,
    set_training_mode,
    trace,
)
from dge_models import padding as padding_module

VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SIZES = [(64, 90), (50, 128), (64, 70)]  # rounded up, two of them agree
CANVASES = [(64, 128), (96, 160)]


def _pyramid(name: str) -> Callable[[], Any]:
    return lambda: timm.create_model(name, **SMALL_PYRAMID)


def _vit(name: str = "vit_small_patch16_224", **kwargs: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, dynamic_img_size=True, **{**VIT, **kwargs})


def _routed(build: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: from_timm(build())


def _feature_pyramid(build: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: SimpleFeaturePyramid(build(), out_channels=8)


EVA = "vit_small_patch16_dinov3"
ROUTED: dict[str, Callable[[], Any]] = {
    "pvt": _pyramid("pvt_dge_s124_tiny_256"),
    "dpvt": _pyramid("dpvt_dge_s124_tiny_256"),
    "vit": _routed(_vit()),
    "average": _routed(_vit(global_pool="avg", class_token=False)),
    "eva": _routed(_vit(EVA)),
}
DENSE = {"dense pvt": _pyramid("pvt_tiny_256"), "dense dpvt": _pyramid("dpvt_tiny_256")}
every_routed = pytest.mark.parametrize("name", ROUTED)
every_model = pytest.mark.parametrize("name", [*ROUTED, *DENSE])


def _build(name: str) -> Any:
    torch.manual_seed(0)
    model = {**ROUTED, **DENSE}[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return scatter_routing(model).eval()


def _batch(canvas: tuple[int, int], fill: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *size, generator=generator) for size in SIZES]
    return torch.stack(
        [F.pad(each, (0, canvas[1] - each.shape[2], 0, canvas[0] - each.shape[1]), value=fill) for each in images]
    )


def _up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _alone(index: int, multiple: int) -> Tensor:
    """One image, with zeros up to whole cells: what it would be given without a batch."""
    rows, cols = _up(SIZES[index], multiple)
    return F.pad(_batch((64, 128))[index : index + 1], (0, cols - 128, 0, rows - 64))


def _maps(model: Any, images: Tensor) -> list[Tensor]:
    if isinstance(model, SimpleFeaturePyramid):
        return list(model(images).values())
    maps: list[Tensor] = model.forward_intermediates(images, intermediates_only=True)
    return maps


def _assert_on_canvas(got: Tensor, own: Tensor, **tolerance: float) -> None:
    """A map [C, H, W] has another one at its top left, and zeros elsewhere."""
    rows, cols = min(own.shape[1], got.shape[1]), min(own.shape[2], got.shape[2])
    torch.testing.assert_close(got[:, :rows, :cols], own[:, :rows, :cols], **{"rtol": 0, "atol": 1e-5, **tolerance})
    outside = got.clone()
    outside[:, :rows, :cols] = 0
    assert not outside.any()


@every_model
@pytest.mark.parametrize("canvas", CANVASES)
def test_maps_are_those_of_each_image_alone(name: str, canvas: tuple[int, int]) -> None:
    model = _build(name)
    multiple = 32 if "pvt" in name else 16
    with torch.no_grad():
        plain = _maps(model, _batch(canvas))
        with padded(model, SIZES):
            maps = _maps(model, _batch(canvas))
        assert [part.shape for part in maps] == [part.shape for part in plain]
        for index in range(len(SIZES)):
            for got, own in zip(maps, _maps(model, _alone(index, multiple)), strict=True):
                _assert_on_canvas(got[index], own[0])
                assert own.any()


@every_routed
def test_choices_and_queries_are_those_of_each_image_alone(name: str) -> None:
    model = _build(name)
    multiple = 32 if "pvt" in name else 16
    seen: set[int] = set()
    with torch.no_grad(), padded(model, SIZES):
        logits, routings = model.forward_routed(_batch((96, 160)))
    for index in range(len(SIZES)):
        with torch.no_grad():
            own_logits, own = model.forward_routed(_alone(index, multiple))
        torch.testing.assert_close(logits[index], own_logits[0], rtol=0, atol=1e-5)
        for got, alone in zip(routings, own, strict=True):
            rows, cols = alone.choice.shape[1:]
            assert torch.equal(got.choice[index, :rows, :cols], alone.choice[0])
            assert torch.equal(got.queries[index], alone.queries[0])
            mask = got.real_regions
            assert mask is not None
            assert mask[index].sum() == rows * cols
            assert (got.choice[index][~mask[index]] == len(got.splits) - 1).all()
            assert torch.equal(got.gate.argmax(-1).to(torch.uint8), got.choice)
            assert got.real_grids is not None
            assert got.real_grids[index] == alone.grid
            seen.update(alone.choice.unique().tolist())
    assert seen == {0, 1, 2}


@every_routed
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_training_does_not_see_the_padding(name: str, mode: Any) -> None:
    gradients = []
    for canvas, fill in ((CANVASES[0], 0.0), (CANVASES[1], 7.0)):
        model = _build(name).train()
        set_training_mode(model, mode)
        images = _batch(canvas, fill).requires_grad_()
        # The noise too is that of the images' own regions.
        torch.manual_seed(2)
        with padded(model, SIZES), collect_routings(model) as collected:
            maps = _maps(model, images)
        loss = sum(part.square().sum() for part in maps)
        (loss + BudgetLoss(0.9, weight=1e4)(model, collected.routings)).backward()
        assert images.grad is not None
        for index, size in enumerate(SIZES):
            inside = images.grad[index].clone()
            inside[:, : size[0], : size[1]] = 0
            assert not inside.any()
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("router" in key and bool(value.any()) for key, value in gradients[0].items())
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, msg=key)


@every_routed
def test_ratios_and_shares_are_means_over_the_images_own_regions(name: str) -> None:
    model = _build(name)
    multiple = 32 if "pvt" in name else 16
    images = _batch((96, 160))
    with padded(model, SIZES), torch.no_grad():
        routings = model.forward_routed(images)[1]
        counted, traced = count_macs(model, images), trace(model, images)
    alone = [_alone(index, multiple) for index in range(len(SIZES))]
    counts = [count_macs(model, image) for image in alone]
    torch.testing.assert_close(counted.total, torch.cat([count.total for count in counts]))
    torch.testing.assert_close(traced.macs, counted.total)
    static = sum(count.static_total for count in counts)
    assert counted.static_total * len(SIZES) == pytest.approx(static)
    assert traced.static_macs == pytest.approx(counted.static_total)
    expected = float(counted.total.sum()) / static
    assert mac_ratio(model, routings).item() == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        own = [model.forward_routed(image)[1] for image in alone]
    cheapest = [cheapest_ratio(model, each) * count.static_total for each, count in zip(own, counts, strict=True)]
    assert cheapest_ratio(model, routings) == pytest.approx(sum(cheapest) / static, abs=1e-6)
    for index, routing in enumerate(routings):
        chosen = torch.cat([each[index].choice.flatten() for each in own])
        shares = chosen.bincount(minlength=3) / len(chosen)
        torch.testing.assert_close(routing.split_shares, shares.float())


def test_the_ratio_without_noise_leaves_padding_out() -> None:
    model = _build("pvt").train()
    ratios = []
    for canvas in CANVASES:
        with deterministic_routing(), padded(model, SIZES):
            routings = model.forward_routed(_batch(canvas))[1]
        assert mac_ratio(model, routings, noiseless=True).item() == pytest.approx(mac_ratio(model, routings).item())
        ratios.append(mac_ratio(model, routings, noiseless=True).item())
    assert ratios[0] == pytest.approx(ratios[1])


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("canvas", [(64, 128), (80, 144), (96, 160)])
def test_feature_pyramids_have_zeros_in_the_padding(routed: bool, canvas: tuple[int, int]) -> None:
    build = _routed(_vit(num_classes=0)) if routed else _vit(num_classes=0)
    torch.manual_seed(0)
    pyramid = scatter_routing(_feature_pyramid(build)()).eval()
    with torch.no_grad():
        plain = _maps(pyramid, _batch(canvas))
        with padded(pyramid, SIZES):
            maps = _maps(pyramid, _batch(canvas))
        assert [part.shape for part in maps] == [part.shape for part in plain]
        for index in range(len(SIZES)):
            for got, own in zip(maps, _maps(pyramid, _alone(index, 32)), strict=True):
                _assert_on_canvas(got[index], own[0])


def test_a_batch_that_is_smaller_than_whole_cells_gives_what_fits() -> None:
    model = _build("pvt")
    images = torch.randn(2, 3, 50, 75)
    with torch.no_grad(), padded(model, [(50, 75), (40, 75)]):
        maps, routings = _maps(model, images), model.forward_routed(images)[1]
        wider = _maps(model, F.pad(images, (0, 21, 0, 14)))
    assert [tuple(part.shape[2:]) for part in maps] == [(12, 18), (6, 9), (3, 4), (1, 2)]
    for got, own in zip(maps, wider, strict=True):
        torch.testing.assert_close(got, own[:, :, : got.shape[2], : got.shape[3]])
    assert routings[0].grid == (16, 24)


def test_a_map_that_is_coarser_than_the_batch_has_one_cell() -> None:
    pyramid = SimpleFeaturePyramid(_vit(num_classes=0)(), out_channels=8, scales=(1, 0.5, 0.25, 0.125)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = _maps(pyramid, images)
        with padded(pyramid, [(32, 32), (20, 32)]):
            maps = _maps(pyramid, images)
    assert [part.shape for part in maps] == [part.shape for part in plain]
    assert tuple(plain[-1].shape[2:]) == (1, 1)


def test_models_that_merge_tokens_follow_padding() -> None:
    torch.manual_seed(0)
    model = merge_tokens(_vit(global_pool="avg", class_token=False)().eval(), 0.8, adaptive=False)
    with torch.no_grad(), padded(model, SIZES):
        logits, counted = model(_batch((96, 160))), count_macs(model, _batch((96, 160)))
        with pytest.raises(ValueError, match="model: merges tokens, and is traced inside padded"):
            trace(model, _batch((96, 160)))
    for index in range(len(SIZES)):
        with torch.no_grad():
            torch.testing.assert_close(logits[index], model(_alone(index, 16))[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(counted.total[index], count_macs(model, _alone(index, 16)).total[0])


@pytest.mark.parametrize("name", ["dense pvt", "vit"])
def test_tokens_and_their_heads(name: str) -> None:
    model = _build(name)
    multiple = 32 if "pvt" in name else 16
    with torch.no_grad(), padded(model, SIZES):
        logits, tokens = model(_batch((96, 160))), model.forward_features(_batch((96, 160)))
    prefix = model.num_prefix_tokens
    grid = (96 // 32, 160 // 32) if "pvt" in name else (96 // 16, 160 // 16)
    spatial = tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    for index in range(len(SIZES)):
        with torch.no_grad():
            own, own_logits = model.forward_features(_alone(index, multiple)), model(_alone(index, multiple))
        torch.testing.assert_close(logits[index], own_logits[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[index, :prefix], own[0, :prefix], rtol=0, atol=1e-5)
        rows, cols = _up(SIZES[index], multiple)
        stride = 32 if "pvt" in name else 16
        own_map = own[0, prefix:].unflatten(0, (rows // stride, cols // stride)).permute(2, 0, 1)
        _assert_on_canvas(spatial[index], own_map)


@pytest.mark.parametrize("fmt", ["NCHW", "NHWC", "NLC"])
def test_intermediates_in_every_format(fmt: str) -> None:
    model = _build("pvt")
    with torch.no_grad(), padded(model, SIZES):
        expected = _maps(model, _batch((96, 160)))
        features, pairs = model.forward_intermediates(_batch((96, 160)), output_fmt=fmt, return_prefix_tokens=True)
        assert torch.equal(features, model.forward_features(_batch((96, 160))))
    for (got, prefix), own in zip(pairs, expected, strict=True):
        wanted = {"NCHW": own, "NHWC": own.permute(0, 2, 3, 1), "NLC": own.flatten(2).transpose(1, 2)}[fmt]
        assert torch.equal(got, wanted)
        assert prefix.shape[:2] == (3, 1 if own is expected[-1] else 0)


def test_a_batch_without_padding_is_run_as_it_is() -> None:
    model, images = _build("pvt"), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, plain = model.forward_routed(images)
        with padded(model, [(64, 96)] * 2):
            logits, routings = model.forward_routed(images)
    assert torch.equal(logits, expected)
    for got, own in zip(routings, plain, strict=True):
        assert torch.equal(got.choice, own.choice)
        assert got.real_grids == (own.grid,) * 2


def test_only_inside_and_only_the_model_that_was_named() -> None:
    model, other, images = _build("pvt"), _build("dpvt"), _batch((64, 128))
    with torch.no_grad():
        plain, unlike = model(images), other(images)
        with padded(model, SIZES):
            assert torch.equal(other(images), unlike)
            inside = model(images)
            with padded(nn.Sequential(model), [(64, 128)] * 3):
                assert torch.equal(model(images), plain)
            assert torch.equal(model(images), inside)
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(torch.inference_mode()(model), images).result(), plain)
        assert torch.equal(model(images), plain)
    assert not torch.equal(inside, plain)
    assert not padding_module.in_use


def test_given_noise_is_that_of_the_images_own_regions() -> None:
    model = _build("pvt").train()
    images = _batch((96, 160))
    noise = [torch.randn(3, *routing.choice.shape[1:], 3) for routing in _routings(model, images)]
    with padded(model, SIZES):
        routings = model.forward_routed(images, noise=noise)[1]
    shapes = [routing.choice.shape[1:] for routing in _routings(model, _alone(1, 32))]
    own_noise = [part[1:2, :rows, :cols] for part, (rows, cols) in zip(noise, shapes, strict=True)]
    own = model.forward_routed(_alone(1, 32), noise=own_noise)[1]
    for got, alone in zip(routings, own, strict=True):
        rows, cols = alone.choice.shape[1:]
        assert torch.equal(got.choice[1, :rows, :cols], alone.choice[0])
    with padded(model, SIZES), pytest.raises(ValueError, match="noise: got 2 tensors; expected one per routed block"):
        model.forward_routed(images, noise=noise[:2])


def _routings(model: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return model.forward_routed(images)[1]


def test_checkpointing_gives_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _build("pvt").train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        with padded(model, SIZES), collect_routings(model) as collected:
            maps = _maps(model, _batch((96, 160)))
        loss = sum(part.square().mean() for part in maps)
        (loss + BudgetLoss()(collected.model, collected.routings)).backward()
        assert len(collected.records[0].forwards) == 1
        gradients.append([parameter.grad for parameter in model.stages.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_several_forward_passes_are_one_batch() -> None:
    model = _build("pvt").train()
    with deterministic_routing(), collect_routings(model) as collected:
        with padded(model, SIZES):
            model(_batch((96, 160)))
        model(_batch((96, 160)))
    routings = collected.routings
    assert routings[0].choice.shape[0] == 6
    assert routings[0].real_grids == ((16, 24), (16, 32), (16, 24), *[(24, 40)] * 3)


def test_fixed_queries_are_for_one_size() -> None:
    model = _build("pvt")
    set_fixed_queries(model, 0.8, image_size=(64, 96))
    images = _batch((96, 160))[::2]
    with torch.no_grad(), padded(model, SIZES[::2]):
        together = model(images)
    for index, logits in zip((0, 2), together, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(_alone(index, 32))[0], logits, rtol=0, atol=1e-5)
    with padded(model, SIZES), pytest.raises(ValueError, match=r"got a token grid of 16 × 32; expected 16 × 24"):
        model(_batch((96, 160)))


def test_compiled_it_computes_the_same() -> None:
    torch.compiler.reset()
    model = scatter_routing(from_timm(_vit(depth=1)())).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        plain = model(_batch((96, 160)))
        torch.testing.assert_close(compiled(_batch((96, 160))), plain)
        assert counter.frame_count == 1
        with padded(model, SIZES):
            expected = model(_batch((96, 160)))
        with padded(compiled, SIZES):
            torch.testing.assert_close(compiled(_batch((96, 160))), expected)
        frames = counter.frame_count
        assert frames > 1
        torch.testing.assert_close(compiled(_batch((96, 160))), plain)
        assert counter.frame_count == frames
    torch.compiler.reset()


def test_what_cannot_be() -> None:
    model = _build("pvt")
    with pytest.raises(ValueError, match="model: got Linear; expected a pyramid, a vision transformer or a Simple"):
        padded(nn.Linear(2, 2), SIZES).__enter__()
    with pytest.raises(ValueError, match=r"image_sizes: got \[3, 4\]; expected \(height, width\) of each image"):
        padded(model, [3, 4]).__enter__()  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"image_sizes: got \(\(0, 4\),\); expected at least 1 × 1"):
        padded(model, torch.tensor([[0, 4]])).__enter__()
    with padded(model, SIZES):
        with pytest.raises(ValueError, match="image_sizes: got 3 sizes; expected one per image of the batch, 2"):
            model(torch.randn(2, 3, 64, 128))
        with pytest.raises(ValueError, match=r"got \(50, 128\); expected at most the batch's 64 × 96 pixels"):
            model(torch.randn(3, 3, 64, 96))
        with pytest.raises(ValueError, match=r"images: got shape \(3, 64, 96\)"):
            model(torch.randn(3, 64, 96))
    fixed = timm.create_model("vit_small_patch16_224", **VIT)
    with padded(from_timm(fixed), [(64, 64)]):
        assert fixed(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert not padding_module.in_use
    assert dge_models.padded is padded
