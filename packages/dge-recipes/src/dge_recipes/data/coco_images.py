"""Images of COCO's format as a detector sees them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dge_recipes.classes import Classes
from dge_recipes.data.coco import CocoData
from dge_recipes.data.coco_annotations import CocoAnnotations, CocoObjects
from dge_recipes.data.dense_targets import detection_target
from dge_recipes.data.identity import DataIdentity, identify_images
from dge_recipes.data.image_sets import ImageSet, is_main_process
from dge_recipes.data.images import SourceImages
from dge_recipes.data.run_lengths import decode_segmentations, mask_api
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import Part
from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = ["HeldOutObjects", "TrainingObjects", "coco_images"]

_LOG = logging.getLogger(__name__)


def coco_images(config: CocoData, part: Part, seed: int | None, folder: Path, *, masks: bool) -> ImageSet:
    """The images of a part: augmented for training by a seed, or plain.

    Args:
        config: the ``data`` section.
        part: training or held-out images.
        seed: the run's; None for the form that evaluation wants.
        folder: the run's, where ``unreadable_images.txt`` is written if it is needed.
        masks: targets hold the objects' masks too.

    Raises:
        UserError: data that is missing or unusable, or faster-coco-eval is not installed and masks are wanted.
    """
    if masks:
        mask_api()
    training = seed is not None
    files = (
        (config.train_annotations, config.train_images)
        if part == "train"
        else (config.val_annotations, config.val_images)
    )
    source = CocoAnnotations(
        config.folder / files[0],
        config.folder / files[1],
        training=training,
        drop_empty=training and config.empty == "drop",
        segmentations=masks,
    )
    if source.cleaned and is_main_process():
        told = "; ".join(f"{number} {what}" for what, number in source.cleaned.items())
        _LOG.warning("%s: %s", config.folder / files[0], told)
    classes = Classes(len(source.classes), tuple(source.classes))
    if config.num_classes is not None and classes.count != config.num_classes:
        raise UserError(
            f"{config.folder / files[0]} has {classes.count} categories; data.num_classes says {config.num_classes}"
        )
    images = HeldOutObjects(source, config, folder) if seed is None else TrainingObjects(source, config, seed, folder)
    return ImageSet(images, 3, lambda: _identify(source, classes))


def _identify(source: CocoAnnotations, classes: Classes) -> DataIdentity:
    def entries() -> Iterator[tuple[str, list[int]]]:
        for index in range(len(source)):
            yield source.entry(index), (np.unique(source.labels(index)) - 1).tolist()

    return identify_images(entries(), classes)


class _Objects(SourceImages):
    """Images with objects.

    Args:
        source: the images.
        config: normalisation, and the policy for unreadable images.
        folder: the run's.
    """

    def __init__(self, source: CocoAnnotations, config: CocoData, folder: Path) -> None:
        super().__init__(source, config, folder)
        self.source = source
        self._finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])

    def _checked(self, picture: Image.Image, index: int) -> tv_tensors.Image:
        """The picture as a tensor, once it has the size that its objects were drawn in."""
        expected = self.source.size(index)
        if picture.size != expected:
            hint = "; data.exif=true turns images upright" if picture.size == expected[::-1] else ""
            raise UserError(
                f"{self.source.name(index)} has {picture.width} x {picture.height} pixels, and its annotations are for "
                f"{expected[0]} x {expected[1]}{hint}"
            )
        return tv_tensors.Image(functional.pil_to_tensor(picture))

    def _masks(self, objects: CocoObjects, index: int) -> tv_tensors.Mask | None:
        if objects.segmentations is None:
            return None
        width, height = self.source.size(index)
        try:
            return tv_tensors.Mask(decode_segmentations(objects.segmentations, height, width))
        except ValueError as error:
            raise UserError(f"the segmentations of {self.source.name(index)} cannot be read: {error}") from error


class TrainingObjects(_Objects):
    """Images flipped by a randomness that (seed, epoch, position) fixes, whichever worker draws them.

    Args:
        source: the images, cleaned for training.
        config: augmentation, normalisation, and the policy for unreadable images: skipping takes the next readable
            image instead.
        seed: the run's seed.
        folder: the run's.
    """

    def __init__(self, source: CocoAnnotations, config: CocoData, seed: int, folder: Path) -> None:
        super().__init__(source, config, folder)
        self.seed, self._augment = seed, v2.RandomHorizontalFlip(config.hflip)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Image float32 [3, H, W], normalised, and its objects without crowds.

        Raises:
            UserError: an image cannot be used, or too many were skipped.
        """
        index, picture = self.next_readable(draw.image, self.picture)
        image, objects = self._checked(picture, index), self.source.objects(index)
        sample: dict[str, Any] = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(objects.boxes).float(), format="XYXY", canvas_size=image.shape[-2:]
            ),
            "masks": self._masks(objects, index),
        }
        with isolated_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position)):
            sample = self._augment(sample)
        boxes: Tensor = sample["boxes"].as_subclass(Tensor)
        masks: Tensor | None = None if sample["masks"] is None else sample["masks"].as_subclass(Tensor)
        labels = torch.from_numpy(objects.labels)
        if masks is not None:  # a polygon between the pixels covers none
            seen = (masks != 0).flatten(1).any(1)
            boxes, labels, masks = boxes[seen], labels[seen], masks[seen]
        return self._finish(sample["image"]).as_subclass(Tensor), detection_target(boxes, labels, masks, index)


class HeldOutObjects(_Objects):
    """Images as evaluation sees them, with all that the file says of their objects, crowds included.

    An image that cannot be read and is skipped is blank, and marked: evaluation leaves it out and counts it.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image float32 [3, H, W], normalised, and its objects.

        Raises:
            UserError: an image cannot be used, or too many were skipped.
        """
        picture, objects = self.picture(index), self.source.objects(index)
        if picture is None:
            self.check_skipped()
            width, height = self.source.size(index)
            image = torch.zeros(3, height, width)
        else:
            image = self._finish(self._checked(picture, index)).as_subclass(Tensor)
        target = detection_target(
            torch.from_numpy(objects.boxes),
            torch.from_numpy(objects.labels),
            self._masks(objects, index),
            index,
            torch.from_numpy(objects.areas),
            torch.from_numpy(objects.crowds),
            readable=picture is not None,
        )
        return image, target
