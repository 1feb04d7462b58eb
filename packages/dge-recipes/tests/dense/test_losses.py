"""The losses of detection and segmentation: their terms, and the budget's."""

from typing import Any

import pytest
import torch
from dense_networks import boxes, detector, pyramid, scattered, segmenter, vit
from torch import Tensor

import dge_models
from dge_recipes.config.schema import BudgetConfig
from dge_recipes.dense import DetectionLosses, SegmentationLosses
from dge_recipes.engine.losses import MEASURED, SHARES

_BUDGET = BudgetConfig()


def _scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    return [torch.randn(3, 64, 64), torch.randn(3, 64, 48)], [
        boxes(2),
        {**boxes(), "masks": boxes()["masks"][:, :, :48]},
    ]


def _masks() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_terms_of_a_detector(kind: str) -> None:
    losses = DetectionLosses(detector(kind), kind, _BUDGET)(*_scenes())
    module = DetectionLosses(detector(kind), kind, _BUDGET)
    assert set(losses) == {*module.names, MEASURED, SHARES}
    terms = set(module.names) - {"loss", "task", "distillation", "budget", "mac_ratio"}
    torch.testing.assert_close(losses["task"], torch.stack([losses[name] for name in terms]).sum())
    torch.testing.assert_close(losses["loss"].detach(), losses["task"] + losses["budget"])
    assert losses[SHARES].shape == (4, 3)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("backbone", [pyramid, vit])
def test_the_budget_reaches_every_router(backbone: Any) -> None:
    budget = BudgetConfig(target=0.6, weight=2.0)
    module = SegmentationLosses(scattered(segmenter(backbone=backbone())), budget)
    with dge_models.deterministic_routing():
        losses = module(*_masks())
    assert 0.6 < losses["mac_ratio"] < 1
    torch.testing.assert_close(losses["budget"], 2 * (losses["mac_ratio"] - 0.6) ** 2)
    routers = [parameter for name, parameter in module.named_parameters() if name.endswith("router.gate.bias")]
    with dge_models.deterministic_routing(), dge_models.collect_routings(module.model) as collected:
        module.model(_masks()[0])
    gradients = torch.autograd.grad(module.budget(collected.model, collected.routings), routers)
    assert len(gradients) == len(collected.routings)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_dense_backbone_spends_all_and_costs_nothing_more() -> None:
    model = detector("retinanet", pyramid(routed=False))
    losses = DetectionLosses(model, "retinanet", BudgetConfig(target=0.1))(*_scenes())
    assert (losses["mac_ratio"], losses["budget"], losses[MEASURED]) == (1, 0, 1)
    assert losses[SHARES].numel() == 0


def test_noise_in_training_and_none_where_it_is_switched_off() -> None:
    module = SegmentationLosses(segmenter(dropout=0.0), _BUDGET)
    batch = _masks()
    assert len({float(module(*batch)["mac_ratio"]) for _ in range(4)}) > 1
    with dge_models.deterministic_routing():
        assert len({float(module(*batch)["loss"].detach()) for _ in range(3)}) == 1


def test_ignored_pixels_do_not_count() -> None:
    module = SegmentationLosses(segmenter(dropout=0.0), _BUDGET)
    images, masks = _masks()
    masks[:, 32:] = 255
    with dge_models.deterministic_routing():
        losses = module(images, masks)
        logits = module.model(images)[:, :, :32]
    expected = torch.nn.functional.cross_entropy(logits, masks[:, :32])
    torch.testing.assert_close(losses["task"], expected.detach())
    assert losses["pixel_accuracy"] == (logits.argmax(1) == masks[:, :32]).float().mean()


def test_a_batch_without_a_known_pixel_is_no_broken_one() -> None:
    images, masks = _masks()
    losses = SegmentationLosses(segmenter(), _BUDGET)(images, torch.full_like(masks, 255))
    assert losses["task"] == losses["pixel_accuracy"] == 0


def test_there_is_no_teacher() -> None:
    with pytest.raises(ValueError, match="teacher: got a tensor; expected None"):
        SegmentationLosses(segmenter(), _BUDGET)(*_masks(), torch.zeros(2, 3))
