"""Folders of images and of index masks beside them, as ADE20K and Cityscapes are laid out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dge_recipes.data.section import Part, PhotographData
from dge_recipes.sections import Count, Fraction, Positive

if TYPE_CHECKING:
    from dge_recipes.data.image_sets import ImageSet

__all__ = ["SegmentationFolderData"]


class SegmentationFolderData(PhotographData):
    """A folder of images and one of index masks for each part, by default laid out as ADE20K's."""

    channels: ClassVar[int] = 3
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    name: Literal["segmentation_folder"]
    # 255 is what ignored pixels have.
    num_classes: Annotated[int, Field(ge=1, le=255)] | None = Field(
        default=None, description="classes; for files, how many there must be, null: any"
    )
    class_names: str | None = Field(
        default=None,
        description="a text file below root with the name of a class in each line, in their order; null: they have "
        "none, and num_classes says how many there are (segmentation_folder)",
    )
    image_size: Count = Field(
        default=512, description="side of the training crop, and short side of the images to evaluate, in pixels"
    )
    train_images: str = Field(default="images/training", description="folder of the training images, below root")
    train_masks: str = Field(
        default="annotations/training", description="folder of the training masks, below root (segmentation_folder)"
    )
    val_images: str = Field(default="images/validation", description="folder of the held-out images, below root")
    val_masks: str = Field(
        default="annotations/validation", description="folder of the held-out masks, below root (segmentation_folder)"
    )
    image_suffix: str | None = Field(
        default=None,
        description="end of the images' file names, which the masks' replaces, for example _leftImg8bit.png; null: the "
        "extension, whichever it is (segmentation_folder)",
    )
    mask_suffix: str = Field(
        default=".png",
        description="end of the masks' file names, for example _gtFine_labelTrainIds.png (segmentation_folder)",
    )
    ignore_index: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=255, description="value of pixels to ignore in the masks, null for none (segmentation_folder)"
    )
    reduce_zero_label: bool = Field(
        default=False,
        description="masks count classes from 1, and 0 is ignored, as in ADE20K (segmentation_folder)",
    )
    size_range: tuple[Positive, Positive] = Field(
        default=(0.5, 2.0),
        strict=False,
        description="training: range of the random size before the crop, over that of evaluation (segmentation_folder)",
    )
    max_class_share: Fraction = Field(
        default=0.75,
        description="training: a crop in which one class has more of the pixels is drawn anew, up to ten times "
        "(segmentation_folder)",
    )
    photometric: bool = Field(
        default=True,
        description="training: random brightness, contrast, saturation and hue (segmentation_folder)",
    )

    @model_validator(mode="after")
    def _check(self) -> "SegmentationFolderData":
        if self.num_classes is None and self.class_names is None:
            raise ValueError(
                "data.num_classes: got null; expected a number, or the file of the names in data.class_names"
            )
        if self.size_range[0] > self.size_range[1]:
            raise ValueError(f"data.size_range: got {list(self.size_range)}, expected the smaller size first")
        return self

    def segmentation_images(self, part: Part, seed: int | None, folder: Path) -> "ImageSet":
        """The images of a part with their masks: augmented for training by a seed, or resized alone."""
        from dge_recipes.data.masked_images import masked_images

        return masked_images(self, part, seed, folder)
