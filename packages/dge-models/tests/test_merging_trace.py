"""What merged, seen from outside and drawn."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_models import build_plain, partly_plain_images
from torch import nn

from dge_models import draw_groups, draw_trace, from_timm, merge_tokens, trace
from dge_models.merging_trace import find_merged


def test_traces_say_what_merged() -> None:
    images = partly_plain_images()
    merged = merge_tokens(build_plain(), 0.7, [images])
    seen = trace(nn.Sequential(merged), images)
    torch.testing.assert_close(seen.logits, merged(images))
    assert seen.groups.shape == (4, 6)
    assert seen.grid == (12, 12)
    for layer, assignment in enumerate(seen.assignment):
        for index in range(6):
            assert assignment[index].unique().tolist() == list(range(int(seen.groups[layer, index]) - 1))
    # Groups only grow together.
    first, last = seen.assignment[0][5].flatten(), seen.assignment[-1][5].flatten()
    assert all(last[first == group].unique().numel() == 1 for group in first.unique())
    assert (seen.groups[-1, 5] < seen.groups[-1, 0]).item()  # the plain picture keeps fewer


def test_merging_models_are_found_in_what_holds_them() -> None:
    merged = merge_tokens(build_plain(), 0.8, adaptive=False)
    assert find_merged(nn.Sequential(nn.Identity(), nn.ModuleList([merged]))) is merged
    assert find_merged(from_timm(build_plain())) is None
    with pytest.raises(ValueError, match="expected one model that merges tokens in it, and it holds 2: 0, 1"):
        trace(nn.Sequential(merged, copy.deepcopy(merged)), partly_plain_images())


def test_groups_are_drawn_in_the_mean_colour_of_their_tokens() -> None:
    image = torch.zeros(3, 8, 8)
    image[0, :, :4] = 1
    image[2, :4, 4:] = 0.5
    picture = draw_groups(image, torch.tensor([[0, 1], [0, 1]]), size=64)
    assert picture.size == (64, 64)
    assert picture.getpixel((10, 10)) == (255, 0, 0)
    assert picture.getpixel((50, 10)) == picture.getpixel((50, 50)) == (0, 0, 64)
    assert picture.getpixel((32, 20)) == (0, 0, 22)  # the line between them
    with pytest.raises(ValueError, match=r"assignment: got torch.float32 \(2, 2\); expected an integer map"):
        draw_groups(image, torch.zeros(2, 2))


def test_a_sheet_shows_the_groups_of_every_block() -> None:
    images = partly_plain_images(batch=2)
    merged = merge_tokens(build_plain(), 0.8, adaptive=False)
    seen = trace(merged, images)
    sheet = draw_trace(images.sigmoid(), seen, layers=[0, 3], size=96)
    whole = draw_trace(images.sigmoid(), seen, size=96)
    assert whole.width > sheet.width
    with pytest.raises(ValueError, match="images: got 1; expected the 2 of the trace"):
        draw_trace(images[:1].sigmoid(), seen)
