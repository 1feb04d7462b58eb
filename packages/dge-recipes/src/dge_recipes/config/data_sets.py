"""The ``data`` section: one class per kind of data set, told apart by ``data.name``."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dge_recipes.config.sections import Count, Fraction, NonNegative, NonNegativeInt, Positive, Section

__all__ = [
    "DATA_SETS",
    "CifarData",
    "DataConfig",
    "DigitsData",
    "HuggingFaceData",
    "INaturalistData",
    "ImageData",
    "ImageFolderData",
    "RandomData",
    "ShapesData",
    "TarData",
    "WebDatasetData",
]


_NUM_IMAGES = "training images (shapes: per epoch, and every epoch draws new ones), and held-out ones of random data"


class DigitsData(Section):
    """scikit-learn's handwritten digits, drawn on flat ground: 1437 training and 360 held-out images."""

    name: Literal["digits"]
    image_size: Count = Field(default=48, description="side of the square image, in pixels")
    digit_size: Positive = Field(default=24.0, description="side of the square that the digit fills, in pixels")
    shift: NonNegative = Field(default=3.0, description="training: largest random shift, in pixels")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="training: largest random change of size, as a fraction"
    )
    rotation: NonNegative = Field(default=10.0, description="training: largest random rotation, in degrees")
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")


class RandomData(Section):
    """Noise with random labels, prepared in memory: for timing the training loop, and for dry runs."""

    name: Literal["random"]
    image_size: Count = Field(default=256, description="side of the square image, in pixels")
    channels: Count = Field(default=3, description="channels of the images (random data)")
    num_classes: Count = Field(default=1000, description="classes; for files, how many there must be, null: any")
    num_images: Count = Field(default=1024, description=_NUM_IMAGES)
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")


class ShapesData(Section):
    """Textured shapes on plain ground, drawn as they are asked for: ten outlines with ten textures."""

    channels: ClassVar[int] = 3

    name: Literal["shapes"]
    image_size: Annotated[int, Field(ge=16)] = Field(default=256, description="side of the square image, in pixels")
    num_classes: Annotated[int, Field(ge=1, le=100)] = Field(
        default=100, description="classes; for files, how many there must be, null: any"
    )
    num_images: Count = Field(default=100_000, description=_NUM_IMAGES)
    held_out_images: Count = Field(default=10_000, description="held-out images (shapes)")
    seed: NonNegativeInt = Field(
        default=0, description="which images are drawn, whatever train.seed is: runs compare on the same ones (shapes)"
    )
    workers: NonNegativeInt = Field(default=0, description="data loading processes per process")


class ImageData(Section):
    """What all data sets of photographs share."""

    root: str = Field(description="folder of the data set's files")
    num_classes: Count | None = Field(default=None, description="classes; for files, how many there must be, null: any")
    image_size: Count = Field(default=256, description="side of the square network input, in pixels")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(
        default=224 / 256, description="evaluation: centre crop's side over the resized short side"
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(default="bicubic", description="resizing filter")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), strict=False, description="normalisation: mean per channel (ImageNet's)"
    )
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), strict=False, description="normalisation: deviation per channel"
    )
    auto_augment: str | None = Field(
        default="rand-m9-mstd0.5-inc1", description="training: timm's policy string, null for none"
    )
    color_jitter: NonNegative = Field(
        default=0.4, description="training: colour jitter; timm applies it only where auto_augment is null"
    )
    hflip: Fraction = Field(default=0.5, description="training: probability of a horizontal flip")
    random_erasing: Fraction = Field(default=0.25, description="training: probability of random erasing (pixel)")
    repeats: Count = Field(
        default=1, description="training: times that an image is drawn in one epoch (repeated augmentation)"
    )
    unreadable: Literal["error", "skip"] = Field(
        default="error",
        description="a file that cannot be read as an image: error ends the run; skip lists it in "
        "unreadable_images.txt, trains on the next image instead, and leaves it out of evaluation, which says so",
    )
    workers: NonNegativeInt = Field(default=8, description="data loading processes per process")


class ImageFolderData(ImageData):
    """root/train/CLASS/IMAGE and root/val/CLASS/IMAGE, as ImageNet is usually laid out."""

    name: Literal["imagefolder"]


class CifarData(ImageData):
    """CIFAR-10 or CIFAR-100 as torchvision reads it: root/cifar-10-batches-py or root/cifar-100-python."""

    name: Literal["cifar10", "cifar100"]


class INaturalistData(ImageData):
    """iNaturalist as torchvision reads it: root/YEAR and, before 2021, root/trainYEAR.json and valYEAR.json."""

    name: Literal["inaturalist"]
    year: Literal[2018, 2019, 2021] = Field(default=2018, description="year of the competition (iNaturalist)")


class TarData(ImageData):
    """Tar files of images: root/train.tar or root/train/*.tar, and val likewise; a folder or tar is a class."""

    name: Literal["tar"]


class WebDatasetData(ImageData):
    """WebDataset shards: KEY.jpg beside KEY.cls, or KEY.json with a label."""

    name: Literal["webdataset"]
    train_shards: str = Field(default="train*.tar", description="training shards below root (webdataset)")
    held_out_shards: str = Field(default="val*.tar", description="held-out shards below root (webdataset)")
    label_key: str = Field(default="label", description="where a KEY.json holds the label (webdataset)")


class HuggingFaceData(ImageData):
    """A Hugging Face data set that ``save_to_disk`` wrote; needs the ``datasets`` package."""

    name: Literal["huggingface"]
    train_split: str = Field(default="train", description="split to train on (huggingface)")
    held_out_split: str = Field(default="validation", description="split to evaluate on (huggingface)")
    image_column: str = Field(default="image", description="column of the images (huggingface)")
    label_column: str = Field(default="label", description="column of the labels (huggingface)")


DataConfig = Annotated[
    DigitsData
    | ImageFolderData
    | CifarData
    | INaturalistData
    | TarData
    | WebDatasetData
    | HuggingFaceData
    | ShapesData
    | RandomData,
    Field(discriminator="name"),
]

DATA_SETS = (
    "digits",
    "imagefolder",
    "cifar10",
    "cifar100",
    "inaturalist",
    "tar",
    "webdataset",
    "huggingface",
    "shapes",
    "random",
)
