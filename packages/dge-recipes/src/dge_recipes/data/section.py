"""What a data set is: a section of the configuration that opens its images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from PIL import Image
from pydantic import Field, model_validator

from dge_recipes.data.image_files import LeftOut
from dge_recipes.sections import Count, Fraction, NonNegative, NonNegativeInt, Positive, Section

if TYPE_CHECKING:
    from dge_recipes.data.image_sets import ImageSet

__all__ = ["DataSection", "ImageData", "ImageSource", "Part", "PhotographData"]

Part = Literal["train", "val"]
Share = Annotated[float, Field(gt=0, le=1)]


class ImageSource(Protocol):
    """Images with labels, in an order that depends on nothing but the files.

    Reading must not depend on what was read before, and must work in several processes forked from one.

    Attributes:
        classes: names of the classes, by number; None where nothing names them.
        left_out: files that lie beside the images and are not used. Hidden ones are not counted.
    """

    num_classes: int
    classes: list[str] | None
    left_out: LeftOut

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """Which file an image is in."""

    def entry(self, index: int) -> str:
        """What tells an image from the others of the data set, and is the same wherever the data lie."""

    def label(self, index: int) -> int:
        """Class of an image, from 0."""

    def read(self, index: int) -> Image.Image:
        """Decode an image, in any mode. What is not a whole image raises what Pillow raises."""


class DataSection(Section):
    """What all data sets share: what their classes and images are to those that weights or a run know.

    Attributes:
        labelled: whether the images have labels, which training and evaluation need.
        tasks: what a model can learn from the images.
    """

    labelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    name: str
    classes: Literal["same", "subset", "new"] = Field(
        default="same",
        description="the data set's classes beside those that weights know, by name: same; subset: some of them, and "
        "the evaluation is among those alone (in training, of the held-out images beside the training images); new: "
        "others than those of model.init_from, whose head is left out",
    )
    changed: Literal["error", "accept"] = Field(
        default="error",
        description="a run is resumed on other images than it was trained on: error ends it; accept goes on, and "
        "summary.json records it",
    )

    def images(self, part: Part, seed: int | None = None) -> "ImageSet":
        """The images of a part with one class each, of a data set that is made in memory and serves classification.

        Args:
            part: which of them.
            seed: the run's, for training; None for evaluation.
        """
        raise NotImplementedError

    def detection_images(self, part: Part, seed: int | None, folder: Path, *, masks: bool = False) -> "ImageSet":
        """The images of a part with boxes, of a data set that serves detection.

        Args:
            part: which of them.
            seed: the run's, for training; None for evaluation.
            folder: the run's, where ``unreadable_images.txt`` is written if it is needed.
            masks: targets hold the objects' masks too.

        Returns:
            Images float32 [3, H, W] with targets as :func:`~dge_recipes.data.dense_targets.detection_target` makes
            them.

        Raises:
            UserError: data that is missing or unusable.
        """
        raise NotImplementedError

    def segmentation_images(self, part: Part, seed: int | None, folder: Path) -> "ImageSet":
        """The images of a part with index masks, of a data set that serves segmentation.

        Args:
            part, seed, folder: as for :meth:`detection_images`.

        Returns:
            For training images float32 [3, S, S] with masks int64 [S, S]; for evaluation images float32 [3, H, W] with
            targets as :func:`~dge_recipes.data.dense_targets.segmentation_target` makes them.

        Raises:
            UserError: data that is missing or unusable.
        """
        raise NotImplementedError


class PhotographData(DataSection):
    """What all data sets of photographs share: where they lie, and how they are read."""

    root: str = Field(description="folder of the data set's files")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), strict=False, description="normalisation: mean per channel (ImageNet's)"
    )
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), strict=False, description="normalisation: deviation per channel"
    )
    hflip: Fraction = Field(default=0.5, description="training: probability of a horizontal flip")
    unreadable: Literal["error", "skip"] = Field(
        default="error",
        description="a file that cannot be read as an image: error ends the run; skip lists it in "
        "unreadable_images.txt, trains on the next image instead, and leaves it out of evaluation, which says so",
    )
    max_unreadable: Fraction = Field(
        default=0.1,
        description="unreadable=skip: share of a split's images that a process may skip, but always ten; more end "
        "the run",
    )
    exif: bool = Field(
        default=False,
        description="turn images upright, as their EXIF orientation says; false: as they are stored, which is what "
        "timm and torchvision do",
    )
    workers: NonNegativeInt = Field(default=8, description="data loading processes per process")

    @property
    def folder(self) -> Path:
        """The folder of the data set's files."""
        return Path(self.root).expanduser()


class ImageData(PhotographData):
    """What all data sets of photographs with one class each share."""

    num_classes: Count | None = Field(default=None, description="classes; for files, how many there must be, null: any")
    image_size: Count = Field(default=256, description="side of the square network input, in pixels")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(
        default=224 / 256, description="evaluation: centre crop's side over the resized short side"
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(default="bicubic", description="resizing filter")
    crop_scale: tuple[Share, Share] = Field(
        default=(0.08, 1.0),
        strict=False,
        description="training: smallest and largest share of an image's area that a random crop shows",
    )
    auto_augment: str | None = Field(
        default="rand-m9-mstd0.5-inc1", description="training: timm's policy string, null for none"
    )
    color_jitter: NonNegative = Field(
        default=0.4, description="training: colour jitter; timm applies it only where auto_augment is null"
    )
    random_erasing: Fraction = Field(default=0.25, description="training: probability of random erasing (pixel)")
    repeats: Count = Field(
        default=1, description="training: times that an image is drawn in one epoch (repeated augmentation)"
    )

    @model_validator(mode="after")
    def _check_crops(self) -> "ImageData":
        smallest, largest = self.crop_scale
        if smallest > largest:
            raise ValueError(f"data.crop_scale: got {[smallest, largest]}, expected the smallest share first")
        return self

    def open(self, part: Part) -> ImageSource:
        """The training or the held-out images.

        Raises:
            UserError: they are not there, or cannot be used.
        """
        raise NotImplementedError
