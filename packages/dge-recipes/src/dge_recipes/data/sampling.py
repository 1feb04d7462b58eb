"""The order in which an epoch draws images, the same for any number of processes and workers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed

__all__ = ["Draw", "EpochSampler"]


class Draw(NamedTuple):
    """One image drawn in training: which one, and the place in the run that fixes its augmentation."""

    epoch: int
    position: int
    image: int


class EpochSampler(Sampler[Draw]):
    """Shuffles every epoch by its number and yields whole global batches of :class:`Draw`.

    The order is a function of the seed and the epoch alone. An epoch is cut to a whole number of optimiser
    steps, so that gradient accumulation never crosses its end and step counts do not depend on how a
    global batch is split among processes and forwards.

    Args:
        num_images: images in the training set.
        global_batch: images per optimiser step, all processes and accumulation steps together.
        seed: the run's seed.
        repeats: times that an image is drawn in an epoch, which then sees 1/repeats of the images
            (repeated augmentation, through timm's sampler).

    Raises:
        UserError: the training set is smaller than one global batch.
    """

    def __init__(self, num_images: int, global_batch: int, seed: int, repeats: int = 1) -> None:
        self.steps_per_epoch = num_images // global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"one step takes {global_batch} images (train.batch_size x processes x "
                f"train.accumulation_steps), but the training set has {num_images}"
            )
        self.num_images, self.global_batch, self.seed, self.repeats = num_images, global_batch, seed, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Accelerate's loaders call this too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.global_batch

    def __iter__(self) -> Iterator[Draw]:
        for position, image in enumerate(self._order()[: len(self)]):
            yield Draw(self.epoch, position, image)

    def _order(self) -> list[int]:
        seed = derive_seed(self.seed, "order", self.epoch)
        if self.repeats == 1:
            generator = torch.Generator().manual_seed(seed)
            return torch.randperm(self.num_images, generator=generator).tolist()
        # One replica, because Accelerate hands the batches out; rounding is done by __len__.
        sampler = RepeatAugSampler(
            range(self.num_images), num_replicas=1, rank=0, num_repeats=self.repeats, selected_round=0
        )
        sampler.set_epoch(seed)  # timm seeds its shuffle with this number alone
        return list(sampler)
