"""From the ``data`` section to the images that it means."""

from pathlib import Path
from typing import Literal

from dge_recipes.config.data_sets import (
    CifarData,
    HuggingFaceData,
    ImageData,
    INaturalistData,
    TarData,
    WebDatasetData,
)
from dge_recipes.data.sources.cifar import CifarSource
from dge_recipes.data.sources.folder import FolderSource
from dge_recipes.data.sources.huggingface import HuggingFaceSource
from dge_recipes.data.sources.inaturalist import INaturalistSource
from dge_recipes.data.sources.source import ImageSource
from dge_recipes.data.sources.tar import TarSource
from dge_recipes.data.sources.webdataset import WebDatasetSource
from dge_recipes.errors import UserError

__all__ = ["check_same_classes", "open_source"]


def open_source(config: ImageData, part: Literal["train", "val"]) -> ImageSource:
    """The training or the held-out images.

    Args:
        config: the ``data`` section.
        part: which of them.

    Raises:
        UserError: they are not there, cannot be used, or have another number of classes than the config says.
    """
    source = _open(config, part)
    if config.num_classes is not None and source.num_classes != config.num_classes:
        raise UserError(
            f"{config.root} ({part}) has {source.num_classes} classes; data.num_classes says {config.num_classes}"
        )
    return source


def _open(config: ImageData, part: Literal["train", "val"]) -> ImageSource:
    root, train = Path(config.root).expanduser(), part == "train"
    if isinstance(config, CifarData):
        return CifarSource(root, config.name, train)
    if isinstance(config, INaturalistData):
        return INaturalistSource(root, config.year, train)
    if isinstance(config, TarData):
        return TarSource(root, part)
    if isinstance(config, WebDatasetData):
        return WebDatasetSource(config, config.train_shards if train else config.held_out_shards)
    if isinstance(config, HuggingFaceData):
        return HuggingFaceSource(config, config.train_split if train else config.held_out_split)
    return FolderSource(root / part)


def check_same_classes(train: ImageSource, held_out: ImageSource) -> None:
    """Training and held-out labels must mean the same.

    Raises:
        UserError: they do not.
    """
    names = getattr(train, "classes", None), getattr(held_out, "classes", None)
    where = f"{train.name(0)} and {held_out.name(0)}"
    if None not in names and names[0] != names[1]:
        only = sorted(set(names[0] or ()) ^ set(names[1] or ()))
        differ = f"differ in {only[:3]}" if only else "have them in another order"
        raise UserError(f"train/ and val/ must hold the same classes, but {differ} ({where})")
    if train.num_classes != held_out.num_classes:
        counts = f"{train.num_classes} training classes and {held_out.num_classes} held-out ones"
        raise UserError(f"got {counts} ({where}); set data.num_classes")
