"""Sections of the data sets that are made in memory; what draws them is imported when they are opened."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dge_recipes.data.section import DataSection, Part
from dge_recipes.sections import Count, NonNegative, NonNegativeInt, Positive

if TYPE_CHECKING:
    from dge_recipes.data.image_sets import ImageSet

__all__ = ["DigitsData", "RandomData", "ScenesData", "ShapesData"]

_IMAGE_SIZE = (
    "side of the square image, in pixels; coco: short side that detectors resize to; segmentation_folder: side of the "
    "training crop, and short side in evaluation, where the long side is at most four times as long"
)
_NUM_CLASSES = "classes; for files, how many there must be, null: any"
_NUM_IMAGES = (
    "training images (shapes, scenes: per epoch, and every epoch draws new ones), and held-out ones of random data"
)


class DigitsData(DataSection):
    """scikit-learn's handwritten digits, drawn on flat ground: 1437 training and 360 held-out images."""

    channels: ClassVar[int] = 1

    name: Literal["digits"]
    image_size: Count = Field(default=48, description=_IMAGE_SIZE)
    digit_size: Positive = Field(default=24.0, description="side of the square that the digit fills, in pixels")
    shift: NonNegative = Field(default=3.0, description="training: largest random shift, in pixels")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="training: largest random change of size, as a fraction"
    )
    rotation: NonNegative = Field(default=10.0, description="training: largest random rotation, in degrees")
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")

    def images(self, part: Part, seed: int | None = None) -> "ImageSet":
        """The images of a part: augmented for training by a seed, or plain."""
        from dge_recipes.data.digits import digit_images

        return digit_images(self, part, seed)


class RandomData(DataSection):
    """Noise with random labels, prepared in memory: for timing the training loop, and for dry runs."""

    name: Literal["random"]
    image_size: Count = Field(default=256, description=_IMAGE_SIZE)
    channels: Count = Field(default=3, description="channels of the images (random data)")
    num_classes: Count = Field(default=1000, description=_NUM_CLASSES)
    num_images: Count = Field(default=1024, description=_NUM_IMAGES)
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")

    def images(self, part: Part, seed: int | None = None) -> "ImageSet":
        """The images of a part: augmented for training by a seed, or plain."""
        from dge_recipes.data.random_images import random_images

        return random_images(self)


class ShapesData(DataSection):
    """Textured shapes on plain ground, drawn as they are asked for: ten outlines with ten textures."""

    channels: ClassVar[int] = 3

    name: Literal["shapes"]
    image_size: Annotated[int, Field(ge=16)] = Field(default=256, description=_IMAGE_SIZE)
    num_classes: Annotated[int, Field(ge=1, le=100)] = Field(default=100, description=_NUM_CLASSES)
    num_images: Count = Field(default=100_000, description=_NUM_IMAGES)
    held_out_images: Count = Field(default=10_000, description="held-out images (shapes, scenes)")
    seed: NonNegativeInt = Field(
        default=0,
        description="which images are drawn, whatever train.seed is: runs compare on the same ones (shapes, scenes)",
    )
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")

    def images(self, part: Part, seed: int | None = None) -> "ImageSet":
        """The images of a part: augmented for training by a seed, or plain."""
        from dge_recipes.data.shapes import shape_images

        return shape_images(self, part, seed)


class ScenesData(DataSection):
    """Scenes with a few textured shapes on a ground that is mostly empty, drawn as they are asked for."""

    channels: ClassVar[int] = 3
    tasks: ClassVar[tuple[str, ...]] = ("detection", "segmentation")

    name: Literal["scenes"]
    image_size: Annotated[int, Field(ge=32)] = Field(default=128, description=_IMAGE_SIZE)
    num_classes: Annotated[int, Field(ge=1, le=10)] = Field(default=5, description=_NUM_CLASSES)
    num_images: Count = Field(default=2000, description=_NUM_IMAGES)
    held_out_images: Count = Field(default=500, description="held-out images (shapes, scenes)")
    max_objects: Count = Field(
        default=5, description="largest number of shapes in an image, the smallest is 1 (scenes)"
    )
    smallest: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.12, description="diameter of the smallest shape over the image's side (scenes)"
    )
    largest: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.4, description="diameter of the largest shape over the image's side (scenes)"
    )
    seed: NonNegativeInt = Field(
        default=0,
        description="which images are drawn, whatever train.seed is: runs compare on the same ones (shapes, scenes)",
    )
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")

    @model_validator(mode="after")
    def _check_sizes(self) -> "ScenesData":
        if self.smallest > self.largest:
            raise ValueError(f"data.smallest: got {self.smallest:g}, expected data.largest ({self.largest:g}) or less")
        return self

    def detection_images(self, part: Part, seed: int | None, folder: Path, *, masks: bool = False) -> "ImageSet":
        """The scenes of a part with boxes: new ones in every epoch for training by a seed, or always the same."""
        from dge_recipes.data.scenes import detection_scenes

        return detection_scenes(self, part, seed, masks=masks)

    def segmentation_images(self, part: Part, seed: int | None, folder: Path) -> "ImageSet":
        """The scenes of a part with index masks: new ones in every epoch for training by a seed, or always the same."""
        from dge_recipes.data.scenes import segmentation_scenes

        return segmentation_scenes(self, part, seed)
