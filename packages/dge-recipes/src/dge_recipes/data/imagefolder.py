"""A folder of images, one folder per class, with timm's transforms."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dge_recipes.config.schema import ImageFolderData
from dge_recipes.data.sampling import Draw
from dge_recipes.errors import UserError
from dge_recipes.randomness import derive_seed, isolated_seed

__all__ = ["TrainingFolder", "evaluation_transform", "open_held_out", "open_training", "training_transform"]

Transform = Callable[[Image.Image], Tensor]


def open_training(config: ImageFolderData, seed: int) -> "TrainingFolder":
    """The images below ``config.root``/train.

    Args:
        config: where the images are and how they are transformed.
        seed: the run's seed, which fixes every augmentation.

    Raises:
        UserError: a missing folder, a class folder without images, or classes other than below val/.
    """
    train = _open(Path(config.root).expanduser() / "train", training_transform(config))
    classes = open_held_out(config).classes
    if train.classes != classes:
        only = sorted(set(train.classes) ^ set(classes))
        raise UserError(f"{config.root}: train/ and val/ must hold the same classes, but differ in {only[:3]}")
    return TrainingFolder(train, seed)


def open_held_out(config: ImageFolderData) -> ImageFolder:
    """The images below ``config.root``/val, with timm's evaluation transform.

    Raises:
        UserError: a missing folder, or a class folder without images.
    """
    return _open(Path(config.root).expanduser() / "val", evaluation_transform(config))


def training_transform(config: ImageFolderData) -> Transform:
    """Timm's training transform for this config: random crop, flip, augmentation policy, erasing."""
    transform: Transform = create_transform(
        config.image_size,
        is_training=True,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        re_prob=config.random_erasing,
        re_mode="pixel",
    )
    return transform


def evaluation_transform(config: ImageFolderData) -> Transform:
    """Timm's evaluation transform: resize the short side, crop the centre, normalise."""
    interpolation = "bicubic" if config.interpolation == "random" else config.interpolation
    transform: Transform = create_transform(config.image_size, interpolation=interpolation, crop_pct=config.crop_pct)
    return transform


class TrainingFolder(Dataset[tuple[Tensor, int]]):
    """Images augmented by a randomness that (seed, epoch, position) fixes, whichever worker draws them."""

    def __init__(self, folder: ImageFolder, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """Image float32 [3, size, size], normalised, and its label."""
        with isolated_seed(derive_seed(self.seed, "augment", draw.epoch, draw.position)):
            sample: tuple[Tensor, int] = self.folder[draw.image]
        return sample


def _open(folder: Path, transform: Transform) -> ImageFolder:
    layout = f"expected {folder.parent}/train/CLASS/IMAGE and {folder.parent}/val/CLASS/IMAGE"
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; {layout}")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise UserError(f"data folder {folder} holds no class folders; {layout}")
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:  # torchvision names the classes without images
        raise UserError(f"data folder {folder}: {error}") from error
