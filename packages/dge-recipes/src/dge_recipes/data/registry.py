"""Every data set there is. One line each: a section, with which the set opens its images."""

from typing import Annotated, get_args

from pydantic import Field

from dge_recipes.data.cifar import CifarData
from dge_recipes.data.coco import CocoData
from dge_recipes.data.folder import ImageFolderData
from dge_recipes.data.generated import DigitsData, RandomData, ScenesData, ShapesData
from dge_recipes.data.huggingface import HuggingFaceData
from dge_recipes.data.inaturalist import INaturalistData
from dge_recipes.data.pictures import PicturesData
from dge_recipes.data.segmentation_folder import SegmentationFolderData
from dge_recipes.data.tar import TarData
from dge_recipes.data.webdataset import WebDatasetData

__all__ = ["DATA_SETS", "DataConfig"]

DataConfig = Annotated[
    DigitsData
    | ImageFolderData
    | CifarData
    | INaturalistData
    | TarData
    | WebDatasetData
    | HuggingFaceData
    | PicturesData
    | ShapesData
    | ScenesData
    | CocoData
    | SegmentationFolderData
    | RandomData,
    Field(discriminator="name"),
]

# Their names, as data.name has them.
DATA_SETS: tuple[str, ...] = tuple(
    name for section in get_args(get_args(DataConfig)[0]) for name in get_args(section.model_fields["name"].annotation)
)
