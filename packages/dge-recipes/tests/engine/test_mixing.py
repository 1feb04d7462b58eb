"""Mixup and CutMix."""

from collections.abc import Callable

import pytest
import torch

from dge_recipes.config import Config
from dge_recipes.engine.losses import build_mixing
from dge_recipes.errors import UserError
from dge_recipes.randomness import seed_everything


def test_no_mixing_by_default(small_config: Callable[..., Config]) -> None:
    assert build_mixing(small_config(), 10) is None


def test_mixed_labels_are_smoothed_and_the_seed_decides(small_config: Callable[..., Config]) -> None:
    mixing = build_mixing(small_config("mixing.mixup=0.8", "mixing.cutmix=1", "train.label_smoothing=0.2"), 10)
    assert mixing is not None
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)

    def mix(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed_everything(seed)
        mixed, targets = mixing(images.clone(), labels)
        return mixed, targets

    mixed, targets = mix(0)
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert targets.min() == pytest.approx(0.02)
    assert torch.equal(mix(0)[0], mixed)
    assert not torch.equal(mix(1)[0], mixed)


def test_odd_batches_cannot_be_mixed(small_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size must be even, got 7"):
        build_mixing(small_config("mixing.mixup=0.8", "train.batch_size=7"), 10)
