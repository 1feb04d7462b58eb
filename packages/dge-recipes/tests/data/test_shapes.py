"""Drawn shapes: always the same ones, never twice, every class, plain ground; not for nearest neighbours."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dge_recipes.config import Config, ShapesData, load_config
from dge_recipes.data import Draw, build_held_out, build_training
from dge_recipes.data.shapes import CELLS, NOISE, OUTLINES, TEXTURES, ShapeImages, TrainingShapes, class_name
from dge_recipes.errors import UserError
from dge_recipes.evaluation.tradeoff import calibration_batches

SMALL = ShapesData(name="shapes", image_size=32, num_images=300, held_out_images=200)


@pytest.fixture
def shapes_config() -> Callable[..., Config]:
    """A small config of the shapes recipe."""
    small = ("data.image_size=32", "data.num_images=240", "data.held_out_images=100", "data.workers=0")

    def build(*overrides: str) -> Config:
        return load_config("shapes_dense", [*small, "train.batch_size=40", *overrides])

    return build


def _stack(images: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in images]), torch.tensor([label for _, label in images])


def _held_out(config: ShapesData) -> tuple[Tensor, Tensor]:
    data = ShapeImages(config)
    return _stack([data[index] for index in range(len(data))])


def test_an_image_follows_from_seed_part_and_number() -> None:
    image, label = ShapeImages(SMALL)[117]
    torch.manual_seed(0)
    again, _ = ShapeImages(SMALL)[117]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 17)
    assert torch.equal(image, again)
    assert not torch.equal(image, ShapeImages(SMALL.model_copy(update={"seed": 1}))[117][0])
    assert not torch.equal(image, ShapeImages(SMALL)[17][0])
    assert -1 < float(image.min()) < float(image.max()) < 1
    assert len(ShapeImages(SMALL)) == 200
    with pytest.raises(IndexError, match="got 200, expected 0 to 199"):
        ShapeImages(SMALL)[200]


def test_every_epoch_draws_new_images_whatever_their_order() -> None:
    data = TrainingShapes(SMALL)
    image, label = data[Draw(epoch=1, position=5, image=9)]
    assert torch.equal(data[Draw(1, 200, 9)][0], image)  # as a run with other workers or another order would
    assert (len(data), label) == (300, 9)
    assert not torch.equal(data[Draw(2, 5, 9)][0], image)
    assert torch.equal(data[Draw(0, 0, 7)][0], ShapeImages(SMALL, held_out=False)[7][0])


def test_no_image_is_drawn_twice() -> None:
    one_class = SMALL.model_copy(update={"num_classes": 1})  # so that nothing but the numbers tells them apart
    data, seen = TrainingShapes(one_class), set()
    for epoch in range(3):
        seen |= {data[Draw(epoch, 0, index)][0].numpy().tobytes() for index in range(300)}
    held_out = {image.numpy().tobytes() for image in _held_out(one_class)[0]}
    assert (len(seen), len(held_out)) == (900, 200)
    assert not seen & held_out


def test_every_class_is_drawn_and_named() -> None:
    assert (_held_out(SMALL)[1].bincount() == 2).all()
    assert len({class_name(label) for label in range(100)}) == len(OUTLINES) * len(TEXTURES) == 100
    few = {tuple(class_name(label).split(", ")) for label in range(10)}
    assert {outline for outline, _ in few} == set(OUTLINES)
    assert {texture for _, texture in few} == set(TEXTURES)
    few_images = _held_out(SMALL.model_copy(update={"num_classes": 7}))[1]
    assert sorted(set(few_images.tolist())) == list(range(7))


def test_the_ground_is_plain_and_the_shape_is_inside() -> None:
    images, _ = _held_out(SMALL.model_copy(update={"image_size": 64, "held_out_images": 400}))
    corners = torch.stack([images[..., y, x] for y in (0, -1) for x in (0, -1)])
    ground = corners.median(0).values[..., None, None]  # at most one corner is the shape's
    shape = ((images - ground).abs() > 2 * NOISE).any(1)
    for mask in shape:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        extents = [int(each[-1] - each[0]) + 1 for each in (rows, columns)]
        assert max(extents) <= 64 / 2 + 1
        # A bar's, a half disc's and a corner's extent depends on how it is turned.
        assert max(extents) >= 64 / 4 * 0.7 - 2
    share = shape.float().mean((1, 2))
    assert share.max() < math.pi * (1 / 4 + 1 / 64) ** 2  # the largest disc, with the pixels that it cuts
    assert share.mean() == pytest.approx(0.06, abs=0.02)
    outside = (images - ground)[~shape.unsqueeze(1).expand_as(images)]
    assert outside.abs().max() <= 2 * NOISE
    assert outside.std() > NOISE / 4


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_are_closed_and_distances_are_true_near_the_edge(name: str) -> None:
    axis = torch.linspace(-1.2, 1.2, 481, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = OUTLINES[name](x, y)
    inside = distance < 0
    assert bool((torch.hypot(x, y)[inside] <= 1 + 1e-6).all())
    assert float(inside.double().mean()) * 2.4**2 > 0.5
    slope = torch.stack(torch.gradient(distance, spacing=2.4 / 480)).norm(dim=0)
    edge = (distance.abs() < 0.05) & (torch.hypot(x, y) < 1.05)
    assert float((slope[edge] - 1).abs().quantile(0.8)) < 0.01  # but at corners and on folds


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_shares_and_differ(name: str) -> None:
    axis = torch.linspace(-1.25, 1.25, 100)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bits = torch.rand(CELLS, CELLS, generator=torch.Generator().manual_seed(0)).round()
    share = TEXTURES[name](x, y, bits)
    assert float(share.min()) == 0
    assert float(share.max()) == pytest.approx(float(name != "plain"), abs=0.01)
    for other, texture in TEXTURES.items():
        if other != name:
            assert float((texture(x, y, bits) - share).abs().mean()) > 0.15


def test_nearest_neighbours_hardly_do_better_than_chance() -> None:
    config = SMALL.model_copy(update={"num_classes": 10, "num_images": 2000})
    data = TrainingShapes(config)
    known, labels = _stack([data[Draw(0, 0, index)] for index in range(len(data))])
    images, expected = _held_out(config)
    # Without the ground's colour, which says nothing, they have the best chance.
    known, images = (each - each.flatten(2).median(2).values[..., None, None] for each in (known, images))
    nearest = torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)
    assert float((labels[nearest] == expected).float().mean()) < 0.3


def test_loaders_and_calibration(shapes_config: Callable[..., Config]) -> None:
    config = shapes_config("eval.batch_size=64")
    training, held_out = build_training(config, 1), build_held_out(config)
    assert (held_out.num_images, held_out.num_classes, held_out.image_shape) == (100, 100, (3, 32, 32))
    batches = [images for images, _ in training.loader]
    with_workers = [images for images, _ in build_training(shapes_config("data.workers=1"), 1).loader]
    assert len(batches) == 6
    assert all(torch.equal(a, b) for a, b in zip(batches, with_workers, strict=True))
    assert [len(batch) for batch in calibration_batches(config)] == [64, 64, 64, 48]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.num_classes=101", r"'data\.num_classes': got 101 \(int\), expected less than or equal to 100"),
        ("data.num_classes=null", r"'data\.num_classes': got None"),
        ("data.image_size=8", r"'data\.image_size': got 8 \(int\), expected greater than or equal to 16"),
        ("data.held_out_images=0", r"'data\.held_out_images': got 0"),
        ("data.num_images=-1", r"'data\.num_images': got -1"),
        ("data.seed=a", r"'data\.seed': got 'a' \(str\)"),
        ("data.texture=dots", r"unknown key: 'data\.texture'"),
    ],
)
def test_keys_are_checked(shapes_config: Callable[..., Config], override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        shapes_config(override)
