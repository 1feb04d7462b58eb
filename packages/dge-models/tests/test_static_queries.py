from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL, Build, scatter_routing
from torch import Tensor

from dge_models import count_macs, mac_ratio, mean_counts, set_dynamic_queries, set_fixed_queries
from dge_models.static_layout import fixed_queries
from dge_models.vit import DGEVisionTransformer

GRIDS: list[dict[str, Any]] = [
    {},
    {"img_size": 28},
    {"img_size": (20, 44)},
    {"splits": (2, 1)},
    {"layers": [1]},
    {"class_token": False, "global_pool": "avg"},
]


def images_for(model: DGEVisionTransformer, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def build_pyramid() -> Any:
    model = timm.create_model(
        "pvt_dge_s124_tiny_256", img_size=64, embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), num_classes=3
    )
    return scatter_routing(model).eval()


@pytest.mark.parametrize("kwargs", GRIDS)
def test_all_finest_is_the_dense_model(small: Build, kwargs: dict[str, Any]) -> None:
    model = small(**kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in ("splits", "layers")}
    dense = timm.create_model("deit_tiny_patch16_256", **{**SMALL, **plain}).eval()
    dense.load_state_dict({key: value for key, value in model.state_dict().items() if "router" not in key})
    assert set_fixed_queries(model, 1.0).ratio == 1.0
    with torch.no_grad():
        images = images_for(model)
        torch.testing.assert_close(model(images), dense(images))


@pytest.mark.parametrize("kwargs", GRIDS)
def test_the_dynamic_choices_counts_give_the_dynamic_output(small: Build, kwargs: dict[str, Any]) -> None:
    model = small(**kwargs)
    for image in images_for(model, 4).split(1):
        set_dynamic_queries(model)
        with torch.no_grad():
            expected, dynamic = model.forward_routed(image)
            set_fixed_queries(model, mean_counts(model, [image]))
            out, fixed = model.forward_routed(image)
        torch.testing.assert_close(out, expected)
        assert all(torch.equal(a.choice, b.choice) for a, b in zip(fixed, dynamic, strict=True))


def test_pyramids() -> None:
    model, image = build_pyramid(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        set_fixed_queries(model, mean_counts(model, [image]))
        torch.testing.assert_close(model(image), expected)
        setting = set_fixed_queries(model, 0.5)
        assert mac_ratio(model, model.forward_routed(image)[1]).item() == pytest.approx(setting.ratio, abs=1e-6)
    assert 0.4 < setting.ratio <= 0.5


@pytest.mark.parametrize("kwargs", [{}, {"img_size": (20, 44)}])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_ratios_are_kept_within_and_every_image_costs_the_same(
    small: Build, kwargs: dict[str, Any], ratio: float
) -> None:
    model = small(**kwargs)
    setting = set_fixed_queries(model, ratio)
    count = count_macs(model, images_for(model, 5))
    assert ratio - 0.15 < setting.ratio <= ratio
    torch.testing.assert_close(count.total / count.static_total, torch.full((5,), setting.ratio, dtype=torch.float64))
    routings = model.forward_routed(images_for(model, 5))[1]
    for routing, queries, counts in zip(routings, setting.queries, setting.counts, strict=True):
        assert routing.queries.tolist() == [queries] * 5
        for choice in routing.choice:
            assert tuple(choice.flatten().bincount(minlength=3).tolist()) == counts


@pytest.mark.parametrize("kwargs", [{}, {"img_size": (20, 44)}, {"splits": (2, 1)}])
@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("ratio", [0.6, 0.8, 1.0])
def test_queries_are_a_multiple_and_no_more_than_without(
    small: Build, kwargs: dict[str, Any], multiple: int, ratio: float
) -> None:
    model = small(**kwargs)
    free = set_fixed_queries(model, ratio)
    setting = set_fixed_queries(model, ratio, multiple=multiple)
    assert setting.ratio <= ratio
    assert all(queries % multiple == 0 for queries in setting.queries)
    if multiple == 1:
        assert setting == free
    block = model.blocks[0].fixed_layout
    regions, where = sum(block.counts), (block.grid, block.splits, block.num_prefix_tokens)
    every = [few for few in product(range(regions + 1), repeat=len(block.counts)) if sum(few) == regions]
    possible = [fixed_queries(few, *where) for few in every]  # the layers are alike, so each one's share is the same
    assert min(setting.queries) >= max(n for n in possible if n % multiple == 0 and n <= free.queries[0])
    routings = model.forward_routed(images_for(model))[1]
    assert [int(routing.queries[0]) for routing in routings] == list(setting.queries)


def test_a_multiple_is_rounded_up_where_there_is_no_smaller_one(small: Build) -> None:
    model = small()
    with pytest.raises(ValueError, match=r"expected one from 0\.\d+, .* rounded to a multiple of 8 queries, to 1"):
        set_fixed_queries(model, 0.215, multiple=8)
    setting = set_fixed_queries(model, 0.26, multiple=8)  # the coarsest split everywhere has 5 queries
    assert set(setting.queries) == {8}


@pytest.mark.parametrize("multiple", [0, -8, 8.0, True, "8", None])
def test_a_multiple_that_is_none_is_refused(small: Build, multiple: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple: got .*; expected a positive integer, such as 8"):
        set_fixed_queries(small(), 0.5, multiple=multiple)


def test_a_multiple_that_no_layer_can_have_is_refused(small: Build) -> None:
    with pytest.raises(
        ValueError, match=r"multiple: got 8; routed layer 0 with splits \(4, 2\) on a 8 × 8 grid and 1 "
    ):
        set_fixed_queries(small(splits=(4, 2)), 0.8, multiple=8)
    with pytest.raises(ValueError, match="multiple: got 8 with counts; expected 1"):
        set_fixed_queries(small(), (1, 1, 2), multiple=8)


def test_better_regions_are_chosen_than_by_chance(small: Build) -> None:
    model, images = small(layers=[0]), torch.randn(8, 3, 32, 32)
    set_fixed_queries(model, (1, 1, 2))
    routing = model.forward_routed(images)[1][0]
    assert routing.logits is not None
    worth = routing.logits[..., 0] - routing.logits[..., 1:].amax(-1)
    best = worth.flatten(1).argmax(1)
    assert torch.equal((routing.choice.flatten(1) == 0).long().argmax(1), best)


def test_training_stays_dynamic_and_the_mode_can_be_left(small: Build) -> None:
    model, images = small(), torch.randn(6, 3, 32, 32)
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(images)
        set_fixed_queries(model, 0.5)
        assert (model(images) - before).abs().max() > 1e-4
        assert set(model.state_dict()) == keys
        assert model.train().forward_routed(images)[1][0].queries.unique().numel() > 1
        set_dynamic_queries(model)
        assert torch.equal(model.eval()(images), before)


def test_copies_keep_the_mode_and_gradients_flow(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    set_fixed_queries(model, 0.5)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(images), model(images))
    model(images).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("router" in name for name in missing)


@pytest.mark.parametrize("size", [32, 28])
def test_export_has_static_shapes_and_no_operator_of_ours(small: Build, size: int) -> None:
    model, images = small(img_size=size), torch.randn(3, 3, size, size)
    set_fixed_queries(model, 0.5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "dge_kernels" in name or "nonzero" in name or ".item" in name]
    free = set().union(*(_symbols(node) for node in program.graph.nodes))
    assert len(free) == 1  # the batch
    with torch.no_grad():
        other = torch.randn(5, 3, size, size)
        torch.testing.assert_close(program.module()(other), model(other))


def _symbols(node: torch.fx.Node) -> set[Any]:
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, Tensor) else ()
    return {symbol for extent in shape if isinstance(extent, torch.SymInt) for symbol in extent.node.expr.free_symbols}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # the exporter's own
def test_onnx_runs_as_the_model_does(small: Build, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = small(img_size=28), torch.randn(2, 3, 28, 28)
    set_fixed_queries(model, 0.5)
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(images))


def test_mean_counts_spend_what_dynamic_routing_spends(small: Build) -> None:
    model, images = small(), torch.randn(40, 3, 32, 32)
    counts = mean_counts(model, list(images.split(20)))
    assert [sum(row) for row in counts] == [4, 4, 4]
    routings = model.forward_routed(images)[1]
    for row, routing in zip(counts, routings, strict=True):
        shares = routing.choice.flatten().bincount(minlength=3) / 40
        assert all(abs(count - share) < 1 for count, share in zip(row, shares.tolist(), strict=True))


def test_bad_input_is_refused_and_changes_nothing(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    set_fixed_queries(model, 0.5)
    with torch.no_grad():
        before = model(images)
    for wanted, message in (
        (0.1, r"got a MAC ratio of 0\.1; expected one from 0\.2134, .* to 1"),
        (1.5, r"ratio_or_counts: got 1\.5; expected a MAC ratio in \(0, 1\]"),
        ((1, 2, 3), r"routed layer 0: counts: got \(1, 2, 3\); .* add up to 4, the regions of a 8 × 8 grid"),
        ([(4, 0, 0), (3, 0, 1)], "got 2 tuples of counts; expected one, or one per routed layer, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            set_fixed_queries(model, wanted)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.equal(model(images), before)
    with pytest.raises(ValueError, match="its queries are fixed"):
        mean_counts(model, [images])
    with pytest.raises(ValueError, match="Linear has no routed block"):
        set_fixed_queries(torch.nn.Linear(2, 2), 0.5)


def test_images_of_another_size_are_refused(small: Build) -> None:
    model = small(dynamic_img_size=True)
    set_fixed_queries(model, 0.5, image_size=(24, 32))
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match="got a token grid of 8 × 8; expected 6 × 8"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"])
def test_models_on_the_meta_device(small: Build, name: str) -> None:
    model = small(name)
    expected = set_fixed_queries(model, 0.6)
    with torch.device("meta"):
        other = small(name)
    assert set_fixed_queries(other, 0.6) == expected
    assert {value.device.type for value in other.buffers()} == {"meta"}
    other.to_empty(device="cpu")
    for module in other.modules():
        getattr(module, "init_non_persistent_buffers", lambda: None)()
    other.load_state_dict(model.state_dict())
    size = model.img_size if "pvt" in name else model.patch_embed.img_size
    images = torch.randn(2, 3, *size)
    assert torch.equal(other(images), model(images))


def test_sizes_that_a_model_does_not_take_are_refused(small: Build) -> None:
    with pytest.raises(ValueError, match=r"image_size: got \(24, 32\); expected \(32, 32\), this model takes no other"):
        set_fixed_queries(small(), 0.5, image_size=(24, 32))
    with pytest.raises(ValueError, match=r"image_size: got \(3, 3\); expected at least one patch"):
        set_fixed_queries(small(dynamic_img_size=True), 0.5, image_size=(3, 3))
    with pytest.raises(ValueError, match="expected 64 × 64"):
        set_fixed_queries(small("pvt_dge_s124_tiny_256", dynamic_img_size=False), 0.5, image_size=(64, 96))
