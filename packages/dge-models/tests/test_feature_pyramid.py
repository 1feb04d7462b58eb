from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import scatter_routing
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

import dge_models
from dge_models import BudgetLoss, SimpleFeaturePyramid, collect_routings, find_routed

SHAPE: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
SIZES = [(256, 320), (250, 333)]


def _pyramid(routed: bool = True, **kwargs: Any) -> SimpleFeaturePyramid:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, **SHAPE)
    if routed:
        model = scatter_routing(dge_models.from_timm(model))
    return SimpleFeaturePyramid(model, **{"out_channels": 8, **kwargs}).eval()


def _boxes(batch: int) -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 200, 200, dtype=torch.uint8)
    masks[:, 20:120, 30:150] = 1
    box = torch.tensor([[30.0, 20.0, 150.0, 120.0]])
    return [{"boxes": box, "labels": torch.tensor([1]), "masks": masks} for _ in range(batch)]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_maps_of_four_strides(routed: bool, size: tuple[int, int]) -> None:
    maps = _pyramid(routed)(torch.randn(2, 3, *size))
    rows, cols = -(-size[0] // 16), -(-size[1] // 16)
    shapes = [tuple(part.shape) for part in maps.values()]
    assert shapes == [(2, 8, int(rows * scale), int(cols * scale)) for scale in (4, 2, 1, 0.5)]
    assert list(maps) == ["0", "1", "2", "3"]


def test_every_map_is_made_from_the_last_tokens() -> None:
    pyramid = _pyramid()
    images = torch.randn(1, 3, 64, 96)
    tokens = pyramid.backbone.forward_features(images)
    grid = tokens[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    for level, part in zip(pyramid.levels, pyramid(images).values(), strict=True):
        torch.testing.assert_close(level(grid), part)


def test_sides_that_are_no_multiple_of_a_patch_are_padded_with_zeros() -> None:
    pyramid, images = _pyramid(), torch.randn(1, 3, 50, 70)
    padded = torch.zeros(1, 3, 64, 80)
    padded[:, :, :50, :70] = images
    for got, expected in zip(pyramid(images).values(), pyramid(padded).values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_row_of_patches_has_a_coarsest_map() -> None:
    maps = _pyramid(scales=(1, 0.5, 0.25))(torch.randn(1, 3, 16, 64))
    assert [tuple(part.shape[2:]) for part in maps.values()] == [(1, 4), (1, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_under_torchvisions_mask_rcnn(size: tuple[int, int]) -> None:
    pyramid = _pyramid(out_channels=16)
    anchors = AnchorGenerator(tuple((side,) for side in (16, 32, 64, 128)), ((1.0,),) * 4)
    short, long = min(size), max(size)
    detector: Any = MaskRCNN(
        pyramid, 3, rpn_anchor_generator=anchors, min_size=short, max_size=long, box_detections_per_img=5
    )
    images = [torch.rand(3, *size), torch.rand(3, *size)]
    detector.train()
    with collect_routings(detector) as collected:
        losses = detector(images, _boxes(2))
    loss = sum(losses.values()) + BudgetLoss()(collected.model, collected.routings)
    loss.backward()
    gates = [block.router.gate.weight.grad for block in find_routed(detector).blocks]  # type: ignore[attr-defined]
    assert all(grad is not None for grad in gates)
    assert any(bool(grad.any()) for grad in gates)
    assert pyramid.levels[0][0].weight.grad.any()  # type: ignore[index, union-attr]
    with torch.no_grad():
        found = detector.eval()(images)
    assert {"boxes", "labels", "scores", "masks"} <= set(found[0])


def test_only_the_budget_reaches_the_routers_as_of_the_model_alone() -> None:
    pyramid = _pyramid().train()
    images = torch.randn(1, 3, 64, 64)
    with dge_models.deterministic_routing(), collect_routings(pyramid) as collected:
        pyramid(images)
        _, routings = pyramid.backbone.forward_routed(images)
    alone = BudgetLoss(target=0.7)(pyramid.backbone, routings)
    torch.testing.assert_close(BudgetLoss(target=0.7)(collected.model, collected.records[0].forwards[0]), alone)


def test_compiled_it_computes_the_same() -> None:
    pyramid = _pyramid()
    images = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(pyramid, backend="eager")
    with torch.no_grad():
        for got, expected in zip(compiled(images).values(), pyramid(images).values(), strict=True):
            torch.testing.assert_close(got, expected)


def test_checkpointing_gives_the_same_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        pyramid = _pyramid().train()
        pyramid.backbone.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with dge_models.deterministic_routing():
            sum(part.square().mean() for part in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()
        grads.append(pyramid.backbone.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_frozen_blocks_get_no_gradient() -> None:
    pyramid = _pyramid(frozen_blocks=2).train()
    sum(part.square().mean() for part in pyramid(torch.randn(1, 3, 64, 64)).values()).backward()
    frozen = {name for name, parameter in pyramid.backbone.named_parameters() if parameter.grad is None}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc1.weight"} <= frozen
    assert not any(name.startswith(("blocks.2.", "norm.")) for name in frozen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": (3.0,)}, r"scales: got 3\.0; expected powers of two"),
        ({"scales": (0.3,)}, r"scales: got 0\.3; expected powers of two"),
        ({"scales": (0.0,)}, r"scales: got 0\.0; expected powers of two"),
        ({"scales": ()}, "scales: got none"),
        ({"out_channels": 0}, "out_channels: got 0"),
        ({"frozen_blocks": 4}, "frozen_blocks: got 4; expected 0 to 3"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _pyramid(**change)


def test_models_and_images_that_cannot_be() -> None:
    pyramid = timm.create_model("pvt_dge_s124_tiny_256")
    with pytest.raises(
        ValueError, match=r"model: got DGEPyramid\w+; expected a vision transformer with one token grid"
    ):
        SimpleFeaturePyramid(pyramid)
    fixed = SimpleFeaturePyramid(timm.create_model("vit_small_patch16_224", num_classes=0, **SHAPE))
    assert len(fixed(torch.zeros(1, 3, 64, 64))) == 4
    with pytest.raises(ValueError, match=r"images: got 64 × 80 pixels; expected \(64, 64\), the model's own size"):
        fixed(torch.zeros(1, 3, 64, 80))
    with pytest.raises(ValueError, match=r"images: got shape \(3, 64, 64\)"):
        fixed(torch.zeros(3, 64, 64))
