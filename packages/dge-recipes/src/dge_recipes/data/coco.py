"""COCO's format: a folder of images, and a JSON file with the objects in them."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dge_recipes.data.section import Part, PhotographData
from dge_recipes.sections import Count

if TYPE_CHECKING:
    from dge_recipes.data.image_sets import ImageSet

__all__ = ["CocoData"]


class CocoData(PhotographData):
    """A folder of images and a JSON file of instances for each part, by default laid out as COCO 2017's."""

    channels: ClassVar[int] = 3
    tasks: ClassVar[tuple[str, ...]] = ("detection",)

    name: Literal["coco"]
    num_classes: Count | None = Field(default=None, description="classes; for files, how many there must be, null: any")
    image_size: Count = Field(default=800, description="short side that a detector resizes images to, in pixels")
    train_images: str = Field(default="train2017", description="folder of the training images, below root")
    train_annotations: str = Field(
        default="annotations/instances_train2017.json", description="training objects, below root (coco)"
    )
    val_images: str = Field(default="val2017", description="folder of the held-out images, below root")
    val_annotations: str = Field(
        default="annotations/instances_val2017.json", description="held-out objects, below root (coco)"
    )
    empty: Literal["drop", "keep"] = Field(
        default="drop", description="training images that show no object: drop, as torchvision's recipe does, or keep"
    )

    def detection_images(self, part: Part, seed: int | None, folder: Path, *, masks: bool = False) -> "ImageSet":
        """The images of a part with boxes: augmented for training by a seed, or plain."""
        from dge_recipes.data.coco_images import coco_images

        return coco_images(self, part, seed, folder, masks=masks)
