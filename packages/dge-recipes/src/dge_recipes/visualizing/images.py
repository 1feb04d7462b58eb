"""Pictures of a user's, as a model sees them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from dge_recipes.config import Config, ImageData
from dge_recipes.data.images import evaluation_transform
from dge_recipes.data.pixels import to_rgb
from dge_recipes.errors import UserError

__all__ = ["find_images", "prepare"]


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files that were named, and those directly inside named folders, in the order of their names.

    Raises:
        UserError: a path that does not exist, or no images at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            extensions = get_img_extensions(as_set=True)
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in extensions)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    if not found:
        raise UserError(f"no images in {', '.join(paths)}")
    return found


def prepare(path: Path, config: Config) -> tuple[Tensor, Tensor]:
    """An image as the model's input, and the same crop to draw on.

    Args:
        path: an image file.
        config: whose evaluation it is prepared as.

    Returns:
        The network's input float32 [C, H, W], and float32 [C, H, W] in [0, 1].

    Raises:
        UserError: it cannot be read.
    """
    data = config.data
    try:
        with Image.open(path) as file:
            picture = to_rgb(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error
    if isinstance(data, ImageData):
        tensor = evaluation_transform(data)(picture)
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (data.mean, data.std))
        return tensor, (tensor * std + mean).clamp(0, 1)
    channels = 1 if data.name == "digits" else data.channels
    resized = picture.resize((data.image_size, data.image_size), Image.Resampling.BICUBIC)
    shown = pil_to_tensor(resized.convert("L" if channels == 1 else "RGB")).float() / 255
    return shown * 2 - 1, shown
