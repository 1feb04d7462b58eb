"""Images with index masks as a segmenter sees them: resized, and for training cropped and augmented."""

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dge_recipes.classes import Classes
from dge_recipes.data.dense_targets import IGNORED, segmentation_target
from dge_recipes.data.identity import identify_images
from dge_recipes.data.image_sets import ImageSet, is_main_process
from dge_recipes.data.images import SourceImages
from dge_recipes.data.mask_files import MaskFiles, read_class_names
from dge_recipes.data.pixels import to_rgb
from dge_recipes.data.sampling import Draw
from dge_recipes.data.section import Part
from dge_recipes.data.segmentation_folder import SegmentationFolderData
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = ["HeldOutMasks", "TrainingMasks", "masked_images"]

_LOG = logging.getLogger(__name__)
_LONGEST = 4  # long side over short side that images are resized to, at most
_CROPS = 10  # drawn until one is not of a single class


def masked_images(config: SegmentationFolderData, part: Part, seed: int | None, folder: Path) -> ImageSet:
    """The images of a part: augmented for training by a seed, or resized alone.

    Args:
        config: the ``data`` section.
        part: training or held-out images.
        seed: the run's; None for the form that evaluation wants.
        folder: the run's, where ``unreadable_images.txt`` is written if it is needed.

    Raises:
        UserError: data that is missing or unusable.
    """
    names = read_class_names(config)
    classes = Classes(config.num_classes or len(names or ()), names)
    source = MaskFiles(config, part, classes.count)
    if source.left_out.total() and is_main_process():
        _LOG.warning("%s", source.left_out.told(part))
    images = HeldOutMasks(source, config, folder) if seed is None else TrainingMasks(source, config, seed, folder)
    entries = ((source.entry(index), ()) for index in range(len(source)))
    return ImageSet(images, 3, lambda: identify_images(entries, classes))


class _Masks(SourceImages):
    """Images with masks.

    Args:
        source: the images.
        config: sizes, augmentation, normalisation, and the policy for unreadable images.
        folder: the run's.
    """

    def __init__(self, source: MaskFiles, config: SegmentationFolderData, folder: Path) -> None:
        super().__init__(source, config, folder)
        self.source, self.config = source, config
        self._finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])

    def _pair(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask] | None:
        """An image uint8 [3, H, W] and its mask uint8 [H, W]; None if either cannot be decoded and the policy is to
        skip."""

        def read() -> tuple[Image.Image, Any]:
            picture = to_rgb(self.source.read(index), upright=self.config.exif)
            return picture, self.source.read_mask(index, picture.size)

        pair = self.readable(index, read)
        if pair is None:
            return None
        return tv_tensors.Image(functional.pil_to_tensor(pair[0])), tv_tensors.Mask(torch.from_numpy(pair[1]))

    def _size(self, image: Tensor, scale: float = 1.0) -> list[int]:
        """Height and width to resize an image to."""
        sides, short = tuple(image.shape[-2:]), self.config.image_size * scale
        factor = min(short / min(sides), _LONGEST * short / max(sides))
        return [max(1, round(side * factor)) for side in sides]


class TrainingMasks(_Masks):
    """Images augmented by a randomness that (seed, epoch, position) fixes, whichever worker draws them.

    They are resized at random, cropped, flipped and changed in colour. Where the crop is larger than the image, the
    rest has the mean colour and is ignored.

    Args:
        source: the images.
        config: as for the held-out images; skipping takes the next readable image instead.
        seed: the run's seed.
        folder: the run's.
    """

    def __init__(self, source: MaskFiles, config: SegmentationFolderData, seed: int, folder: Path) -> None:
        super().__init__(source, config, folder)
        self.seed = seed
        steps = [v2.RandomHorizontalFlip(config.hflip)]
        if config.photometric:
            steps.append(v2.RandomPhotometricDistort())
        self._augment = v2.Compose(steps)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Image float32 [3, S, S], normalised, and its mask int64 [S, S].

        Raises:
            UserError: an image or a mask cannot be used, or too many were skipped.
        """
        _, (image, mask) = self.next_readable(draw.image, self._pair)
        with isolated_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position)):
            scale = float(torch.empty(1).uniform_(*self.config.size_range))
            size = self._size(image, scale)
            image, mask = functional.resize(image, size, antialias=True), functional.resize(mask, size)
            window = self._window(mask)
            image, mask = self._augment(functional.crop(image, *window), functional.crop(mask, *window))
        finished, side = self._finish(image).as_subclass(Tensor), self.config.image_size
        rest = [0, 0, side - window[3], side - window[2]]  # left, top, right, bottom
        finished = functional.pad(finished, rest, fill=0.0)  # the mean, once normalised
        return finished, functional.pad(mask, rest, fill=IGNORED).as_subclass(Tensor).long()

    def _window(self, mask: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop."""
        rows, columns = mask.shape[-2:]
        height, width = min(rows, self.config.image_size), min(columns, self.config.image_size)
        for _ in range(_CROPS):
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            part = mask[..., top : top + height, left : left + width]
            counts = torch.bincount(part[part != IGNORED].flatten().long())
            if len(counts) and float(counts.max()) <= self.config.max_class_share * float(counts.sum()):
                break
        return top, left, height, width


class HeldOutMasks(_Masks):
    """Images as evaluation sees them, and their masks in the size of the file.

    An image that cannot be read and is skipped is blank, and marked: evaluation leaves it out and counts it.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image float32 [3, h, w], normalised, and its mask.

        Raises:
            UserError: an image or a mask cannot be used, or too many were skipped.
        """
        pair = self._pair(index)
        if pair is None:
            self.check_skipped()
            side = self.config.image_size
            blank = torch.full((side, side), IGNORED)
            return torch.zeros(3, side, side), segmentation_target(blank, index, readable=False)
        image, mask = pair
        image = functional.resize(image, self._size(image), antialias=True)
        return self._finish(image).as_subclass(Tensor), segmentation_target(mask.as_subclass(Tensor), index)
