from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import Build
from torch import Tensor, nn

from dge_models import count_macs, from_timm
from dge_models.routed import routed_blocks
from dge_models.split_damage import Reads, measure_damage, unit_outputs


def measured(model: Any, images: Tensor, projections: int = 2, reads: Reads = "tokens", seed: int = 0) -> Any:
    return measure_damage(model, images, projections, reads, torch.Generator().manual_seed(seed))


def choose(model: Any, block: int, region: int | None, split: int) -> Any:
    """Hooks that give one region of one block a split, and all others the finest."""

    def chosen(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
        size = model.blocks[0].router.splits[0]
        choice = torch.zeros(x.shape[0], -(-grid[0] // size), -(-grid[1] // size), dtype=torch.uint8)
        if region is not None and chosen.block == block:  # type: ignore[attr-defined]
            choice.flatten(1)[:, region] = split
        chosen.block += 1  # type: ignore[attr-defined]
        return choice

    chosen.block = 0  # type: ignore[attr-defined]
    for each in routed_blocks(model):
        each.router.choose = chosen
    return model


@pytest.mark.parametrize(("splits", "size"), [((2, 1), 32), ((4, 2, 1), 28)])
def test_what_is_measured_is_what_happens(small: Build, splits: tuple[int, ...], size: int) -> None:
    """The last block before a linear readout: the first order is all there is."""
    model = small(splits=splits, img_size=size, num_classes=0, depth=2).double()
    model.norm = nn.Identity()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    model.forward_head = lambda x, pre_logits=False: x
    directions = torch.randn(1, 32, dtype=torch.float64)

    def read(model: Any, images: Tensor, reads: str) -> list[Tensor]:
        return [model.forward_features(images)[:, 1:] * directions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dge_models.split_damage.unit_outputs", read)
        patch.setattr("dge_models.split_damage._project", lambda output, generator: output.sum())
        damage = measured(model, images, 1)[1]
    regions = math.ceil(size / 4 / splits[0]) ** 2
    assert damage.means.shape == (2 * regions, 32)
    moved = damage.moved.view(2, regions, len(splits) - 1)
    with torch.no_grad():
        for region in (0, regions - 1):
            ends = [
                read(choose(copy.deepcopy(model), 1, region, split), images, "")[0].sum((1, 2))
                for split in range(len(splits))
            ]
            for split in range(1, len(splits)):
                torch.testing.assert_close(moved[:, region, split - 1], ends[split] - ends[split - 1])


def test_saved_shares_are_those_of_counted_macs(small: Build) -> None:
    model, images = small(img_size=28), torch.randn(1, 3, 28, 28)
    damage = measured(model, images)
    finest = count_macs(choose(model, 0, None, 0), images).total
    for region in (0, 3):
        coarse = count_macs(choose(model, 1, region, 2), images)
        share = ((finest - coarse.total) / coarse.static_total).item()
        assert damage[1].saved[region].sum().item() == pytest.approx(share, rel=1e-5)


def test_projections_measure_the_squared_distance_of_unit_outputs(small: Build) -> None:
    """For a tiny step, the mean over many directions is the squared change of class token and mean token."""
    model = small(splits=(2, 1), num_classes=0, depth=2, global_pool="token").double()
    for layer in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
        layer.weight.data *= 1e-2  # so that the step is small
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    damage = measured(model, images, 1000)[1].moved.square().mean(-1)
    with torch.no_grad():
        before = unit_outputs(choose(copy.deepcopy(model), 1, None, 0), images, "tokens")
        after = unit_outputs(choose(copy.deepcopy(model), 1, 5, 1), images, "tokens")
    expected = sum((a - b).square().sum(-1).mean() for a, b in zip(after, before, strict=True))
    assert damage[5].item() == pytest.approx(float(expected), rel=0.1, abs=0)


def test_outputs_have_length_one_whatever_is_read(small: Build) -> None:
    images = torch.randn(2, 3, 32, 32)
    for model, reads, shapes in [
        (small(), "class", [(2, 1, 7)]),
        (small(), "tokens", [(2, 1, 32), (2, 64, 32)]),
        (small(num_classes=0), "class", [(2, 1, 32)]),
        (small(num_classes=0, global_pool=""), "tokens", [(2, 1, 32), (2, 64, 32)]),
        (small(num_classes=0, global_pool="avg", class_token=False), "tokens", [(2, 1, 32), (2, 64, 32)]),
        (small(num_classes=0, global_pool="", class_token=False), "class", [(2, 64, 32)]),
        (small("deit_dge_s124_tiny_distilled_patch16_256"), "class", [(2, 1, 7)]),
    ]:
        outputs = unit_outputs(model, images, reads)
        assert [tuple(output.shape) for output in outputs] == shapes
        for output in outputs:
            torch.testing.assert_close(output.norm(dim=-1), torch.ones(output.shape[:-1]))
    model = small()
    torch.testing.assert_close(unit_outputs(model, images, "class")[0][:, 0].square(), model(images).softmax(-1))


def test_patch_tokens_of_the_last_block_do_no_damage_to_a_class_token(small: Build) -> None:
    damage = measured(small(global_pool="token"), torch.randn(2, 3, 32, 32), reads="class")
    assert [bool(layer.moved.any()) for layer in damage] == [True, True, False]


def test_the_model_is_left_as_it_was(small: Build) -> None:
    model = small().train()
    model.blocks[1].eval()
    model.blocks[0].attn.requires_grad_(False)
    model.set_grad_checkpointing()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        damage = measured(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not images.requires_grad
    assert not any(block._forward_hooks for block in model.blocks)
    model.set_grad_checkpointing(False)
    for layer, plain in zip(damage, measured(model, images), strict=True):
        torch.testing.assert_close(layer.moved, plain.moved, rtol=1e-3, atol=1e-7)


def test_the_seed_and_the_weights_alone_decide(small: Build) -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    first, again, other = (measured(model, images, seed=seed)[0].moved for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    converted = from_timm(plain.eval())
    assert F.cosine_similarity(converted(images), plain(images)).min() > 0.9999
    assert all(layer.moved.any() for layer in measured(converted, images))
