from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dge_models.pvt_block import PyramidBlock
from dge_models.pyramid_stage import PyramidStage, resize_positions, spatial_map


def _stage(grid: tuple[int, int] = (4, 6), class_token: bool = True, **kwargs: Any) -> PyramidStage:
    new_block = partial(PyramidBlock, num_heads=2, mlp_ratio=2)
    stage = PyramidStage(
        grid, 3, 8, 2, new_block, patch_size=2, class_token=class_token, drop_path=[0.0, 0.0], **kwargs
    )
    stage.reset_parameters()
    return stage


def _bilinear(embedding: Tensor, stored: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    grid = embedding.unflatten(1, stored).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(grid, wanted, mode="bilinear").flatten(2).transpose(1, 2)


def test_positions_are_resized_bilinearly_and_the_class_tokens_is_kept() -> None:
    embedding = torch.randn(1, 1 + 24, 8)
    resized = resize_positions(embedding, (4, 6), (6, 5), 1)
    assert torch.equal(resized[:, :1], embedding[:, :1])
    torch.testing.assert_close(resized[:, 1:], _bilinear(embedding[:, 1:], (4, 6), (6, 5)))
    assert resize_positions(embedding, (4, 6), (4, 6), 1) is embedding
    turned = resize_positions(embedding, (4, 6), (6, 4), 1)  # as many tokens, another shape
    torch.testing.assert_close(turned[:, 1:], _bilinear(embedding[:, 1:], (4, 6), (6, 4)))


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (9, 13), (2, 3)])
def test_a_stage_embeds_whole_patches(size: tuple[int, int]) -> None:
    stage, images = _stage().eval(), torch.randn(2, 3, *size)
    tokens, grid = stage.embed(images)
    rows, cols = size[0] // 2, size[1] // 2
    assert grid == (rows, cols)
    patches = torch.nn.functional.conv2d(images, stage.patch_embed.proj.weight, stage.patch_embed.proj.bias, stride=2)
    norm = stage.patch_embed.norm
    normed = torch.nn.functional.layer_norm(patches.flatten(2).transpose(1, 2), (8,), norm.weight, norm.bias, 1e-5)
    positions = resize_positions(stage.pos_embed, (4, 6), grid, 1)
    torch.testing.assert_close(tokens[:, 1:], normed + positions[:, 1:])
    torch.testing.assert_close(tokens[:, :1], (stage.cls_token + positions[:, :1]).expand(2, -1, -1))
    out, _, routings = stage(images)
    assert out.shape == tokens.shape
    assert routings == []


def test_a_map_is_the_spatial_tokens() -> None:
    tokens = torch.arange(2.0 * 7 * 3).view(2, 7, 3)
    maps = spatial_map(tokens, (2, 3), 1)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[:, :, 1, 2], tokens[:, 6])


def test_setting_the_grid_keeps_what_the_stage_computes() -> None:
    stage, images = _stage().eval(), torch.randn(1, 3, 10, 6)
    expected = stage(images)[0]
    stage.set_grid_size((5, 3))
    assert stage.pos_embed.shape == (1, 1 + 15, 8)
    torch.testing.assert_close(stage(images)[0], expected)
