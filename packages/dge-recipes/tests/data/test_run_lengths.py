"""Masks as run lengths and polygons: as pycocotools has them, and back."""

from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import column_runs, compressed, ring

from dge_recipes.data.run_lengths import decode_segmentations, encode_masks
from dge_recipes.errors import UserError

pytest.importorskip("faster_coco_eval")


def _masks() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 33, 21, generator=generator) < torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 0.3]).view(-1, 1, 1)
    masks[5] = torch.from_numpy(ring(21, 33, (2, 3, 19, 30)).copy()) != 0
    return masks


def test_encoding_is_the_formats_own() -> None:
    for mask, (size, counts) in zip(_masks(), encode_masks(_masks()), strict=True):
        assert size == (33, 21)
        assert counts.decode() == compressed(column_runs(mask.numpy()))
    assert encode_masks(torch.zeros(0, 5, 6)) == ()


@pytest.mark.parametrize("form", ["text", "bytes", "numbers"])
def test_every_form_of_run_lengths_comes_back(form: str) -> None:
    runs = [column_runs(mask.numpy()) for mask in _masks()]
    texts = [compressed(each) for each in runs]
    counts: list[Any] = {"text": texts, "bytes": [each.encode() for each in texts], "numbers": runs}[form]
    decoded = decode_segmentations([{"size": [33, 21], "counts": each} for each in counts], 33, 21)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded != 0, _masks())


def test_polygons_of_one_object_are_one_mask() -> None:
    square, other = [2, 3, 6, 3, 6, 8, 2, 8], [10, 10, 14, 10, 14, 12, 10, 12]
    masks = decode_segmentations([[square, other], [square], [], [[1, 1, 5, 5]]], 20, 30)
    expected = np.zeros((20, 30), np.uint8)
    expected[3:8, 2:6] = 1
    assert np.array_equal(masks[1].numpy(), expected)
    expected[10:12, 10:14] = 1
    assert np.array_equal(masks[0].numpy(), expected)
    assert not masks[2:].any()
    assert decode_segmentations([], 4, 5).shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (3, "got a int, expected a list of polygons or run lengths"),
        ({"size": [4, 5]}, "got a dict, expected a list"),
        ([3.0, 4.0], "got a list, expected a list of polygons"),
        ({"size": [5, 4], "counts": [20]}, r"got size \[5, 4\] of run lengths, expected \[4, 5\]"),
        ({"size": [4, 5], "counts": [19]}, "got run lengths of 19 pixels, expected 20"),
        ({"size": [4, 5], "counts": [21, -1]}, "got counts of type list"),
        ({"size": [4, 5], "counts": None}, "got counts of type NoneType"),
        ({"size": [4, 5], "counts": compressed([3, 200])}, "run lengths (of 200 pixels|that are damaged)"),
    ],
)
def test_what_is_no_mask_is_told(segmentation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_segmentations([segmentation], 4, 5)


def test_without_the_library_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval.core", None)
    with pytest.raises(
        UserError, match=r'^masks of objects need faster-coco-eval: pip install "dge-recipes\[dense\]"$'
    ):
        encode_masks(_masks())
