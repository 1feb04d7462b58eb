"""The digits: fixed split, flat ground, randomness that follows from the place in the run."""

import math

import pytest
import torch

from dge_recipes.config import DigitsData
from dge_recipes.data.digits import TrainingDigits, UprightDigits, digit_arrays, render_digits
from dge_recipes.data.sampling import Draw


def test_the_split_is_fixed_and_stratified() -> None:
    train, train_labels, held_out, labels = digit_arrays()
    assert (train.shape, held_out.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (float(train.min()), float(train.max())) == (0.0, 1.0)
    assert all(34 <= count <= 38 for count in labels.bincount().tolist())
    assert labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert len(train_labels) == 1437


def test_held_out_digits_are_centred_on_flat_ground_and_always_the_same() -> None:
    config = DigitsData(name="digits", image_size=48, digit_size=24.0)
    data = UprightDigits(config)
    image, label = data[0]
    assert (len(data), image.shape, image.dtype, label) == (360, (1, 48, 48), torch.float32, 7)
    assert (float(data.images.min()), float(data.images.max())) == (-1.0, 1.0)
    # A scan's pixel is 3 image pixels wide, and interpolation reaches half of that further out.
    border = torch.ones(48, 48, dtype=torch.bool)
    border[10:38, 10:38] = False
    assert (data.images[:, 0, border] == -1).all()
    assert torch.equal(UprightDigits(config)[0][0], image)


def test_rendering_moves_turns_and_scales() -> None:
    scan = torch.zeros(1, 1, 8, 8)
    scan[..., 0, 0] = 1.0  # top left

    def brightest(
        size: float = 16.0, rotation: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[int, int]:
        image = render_digits(scan, 64, torch.tensor([size]), torch.tensor([rotation]), torch.tensor([shift]))
        index = int(image.argmax())
        return index % 64, index // 64

    x, y = brightest()
    assert (abs(x - 24.5) <= 1, abs(y - 24.5) <= 1) == (True, True)
    moved = brightest(shift=(5.0, -3.0))
    assert (moved[0] - x, moved[1] - y) == (5, -3)
    larger = brightest(size=32.0)
    assert abs(larger[0] - 17.5) <= 1.5
    turned = brightest(rotation=math.pi / 2)  # counter-clockwise: top left goes to bottom left
    assert abs(turned[0] - 24.5) <= 1
    assert abs(turned[1] - 38.5) <= 1


def test_augmentation_follows_from_seed_epoch_and_position() -> None:
    config = DigitsData(name="digits")
    data = TrainingDigits(config, seed=3)
    image, label = data[Draw(epoch=1, position=5, image=9)]
    torch.manual_seed(0)
    torch.rand(7)
    again, _ = TrainingDigits(config, seed=3)[Draw(1, 5, 9)]
    assert torch.equal(image, again)
    assert (len(data), image.shape, label) == (1437, (1, 48, 48), int(digit_arrays()[1][9]))
    for draw, seed in ((Draw(2, 5, 9), 3), (Draw(1, 6, 9), 3), (Draw(1, 5, 9), 4)):
        assert not torch.equal(TrainingDigits(config, seed)[draw][0], image)


def test_augmentation_stays_within_its_bounds() -> None:
    plain = DigitsData(name="digits", shift=0.0, scale=0.0, rotation=0.0)
    images = [TrainingDigits(plain, 0)[Draw(0, position, 4)][0] for position in range(3)]
    assert torch.equal(images[0], images[1])
    shifted = DigitsData(name="digits", shift=3.0, scale=0.0, rotation=0.0)

    def centre(image: torch.Tensor) -> torch.Tensor:
        ink = (image[0] + 1) / 2
        axis = torch.arange(48.0)
        return torch.stack([(ink.sum(0) * axis).sum(), (ink.sum(1) * axis).sum()]) / ink.sum()

    offsets = torch.stack(
        [centre(TrainingDigits(shifted, 0)[Draw(0, position, 4)][0]) - centre(images[0]) for position in range(50)]
    )
    assert offsets.abs().max() == pytest.approx(3.0, abs=0.3)
    assert offsets.mean(0).abs().max() < 1.0


def test_a_batch_at_once_is_image_for_image_the_same() -> None:
    data = TrainingDigits(DigitsData(name="digits"), seed=3)
    draws = [Draw(1, position, 37 * position % 1437) for position in range(67)]
    for (image, label), draw in zip(data.__getitems__(draws), draws, strict=True):
        alone, expected = data[draw]
        assert torch.equal(image, alone)
        assert label == expected
