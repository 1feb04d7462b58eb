"""Loaders: what a global batch holds does not depend on how it is split, nor on workers."""

from collections.abc import Callable

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch import Tensor

from dge_recipes.config import Config
from dge_recipes.data import build_held_out, build_training


def _global_batches(config: Config, processes: int, epoch: int = 0, skip: int = 0) -> list[Tensor]:
    """The images of each optimiser step, over all processes and accumulation steps, in a canonical order."""
    parts = []
    for rank in range(processes):
        training = build_training(config, processes)
        loader = prepare_data_loader(training.loader, num_processes=processes, process_index=rank)
        loader.set_epoch(epoch)
        parts.append([images for images, _ in (skip_first_batches(loader, skip) if skip else loader)])
    forwards = [torch.cat(images) for images in zip(*parts, strict=True)]
    steps = config.train.accumulation_steps
    batches = [torch.cat(forwards[start : start + steps]) for start in range(0, len(forwards), steps)]
    return [batch[batch.flatten(1).sum(1).argsort()] for batch in batches]


def test_a_step_sees_the_same_images_however_it_is_split(small_config: Callable[..., Config]) -> None:
    one = _global_batches(small_config("train.batch_size=64"), processes=1)
    assert len(one) == 22
    two = _global_batches(small_config("train.batch_size=32"), processes=2)
    four = _global_batches(small_config("train.batch_size=16", "train.accumulation_steps=4"), processes=1)
    for first, second, third in zip(one, two, four, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize("processes", [1, 2])
def test_skipping_continues_in_the_same_order(small_config: Callable[..., Config], processes: int) -> None:
    config = small_config("train.batch_size=64")
    whole = _global_batches(config, processes, epoch=3)
    rest = _global_batches(config, processes, epoch=3, skip=5)
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))
    assert not torch.equal(whole[0], _global_batches(config, processes, epoch=2)[0])


def test_workers_change_nothing(small_config: Callable[..., Config]) -> None:
    config = small_config("train.batch_size=700")
    batches = [
        [images for images, _ in build_training(each, 1).loader]
        for each in (config, config.model_copy(update={"data": config.data.model_copy(update={"workers": 2})}))
    ]
    assert len(batches[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_held_out_facts(small_config: Callable[..., Config]) -> None:
    held_out = build_held_out(small_config())
    assert (held_out.num_images, held_out.num_classes, held_out.image_shape) == (360, 10, (1, 32, 32))
    assert sum(len(labels) for _, labels in held_out.loader) == 360
