"""Pictures of every kind that Pillow opens, as 8-bit RGB."""

import numpy as np
from PIL import Image

__all__ = ["to_rgb"]

_WHITE = 65535  # of 16 bits


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB. Transparency is dropped, as timm and torchvision do.

    Pillow's own conversion cuts grey values of more than 8 bits off at 255, which turns most of a 16-bit picture
    white without a word; here they are scaled.

    Args:
        picture: in any mode.

    Raises:
        ValueError: its pixels are floating-point numbers or need more than 16 bits, so that nobody knows which of
            them is white.
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > _WHITE:
            raise ValueError(f"its pixels go from {grey.min()} to {grey.max()}; expected 8 or 16 bits")
        return Image.fromarray((grey * 255 / _WHITE).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:  # Pillow asks for this step, by a warning
        picture = picture.convert("RGBA")
    return picture.convert("RGB")
