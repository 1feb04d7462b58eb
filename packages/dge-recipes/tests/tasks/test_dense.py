"""The batches of an evaluation do not depend on the number of processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from dge_recipes.tasks.dense import evaluating, own_batches


@pytest.mark.parametrize(
    ("images", "batch_size", "processes"), [(10, 4, 1), (10, 4, 2), (3, 4, 2), (12, 4, 3), (1, 2, 4), (9, 3, 2)]
)
def test_repeated_images_are_left_out(images: int, batch_size: int, processes: int) -> None:
    sampler: Any = BatchSampler(range(images), batch_size, drop_last=False)
    held_out: Any = SimpleNamespace(loader=SimpleNamespace(batch_size=batch_size))
    met, counts = [], set()
    for process in range(processes):
        accelerator: Any = SimpleNamespace(num_processes=processes, process_index=process)
        loader = [_batch(numbers) for numbers in BatchSamplerShard(sampler, processes, process)]
        batches = [[int(image) for image in found] for found, _ in own_batches(loader, accelerator, held_out)]
        met += [numbers for numbers in batches if numbers]
        counts.add(len(batches))
    assert sorted(met) == list(sampler)  # what one process would see, each batch once
    assert len(counts) == 1  # nobody is waited for in vain


def _batch(numbers: list[int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [torch.tensor(number) for number in numbers], [{"image_id": torch.tensor(number)} for number in numbers]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training: bool) -> None:
    model = nn.Dropout().train(training)
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training is training
