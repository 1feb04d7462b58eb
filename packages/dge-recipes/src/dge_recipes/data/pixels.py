"""Pictures of every kind that Pillow opens, as 8-bit RGB: as data sets have them, and as people see them."""

import io
import logging
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

__all__ = ["as_seen", "to_rgb"]

_LOG = logging.getLogger(__name__)
_WHITE = 65535  # of 16 bits
_WHITE_12, _BITS_PER_SAMPLE = 4095, 258  # of 12 bits, which only a TIFF's tag tells from 16
_TRANSPARENT = {"LA", "PA", "RGBA"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow may raise over damaged meta data of a whole picture.
_DAMAGED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, struct.error),
)
_SPACES = {"RGB ": ("RGB", "RGBX", "YCbCr", "HSV"), "GRAY": ("L", "1"), "CMYK": ("CMYK",)}  # whose profile is for which


def to_rgb(picture: Image.Image, *, upright: bool = False) -> Image.Image:
    """Convert a picture to 8-bit RGB as timm and torchvision do: transparency dropped, colour profiles ignored.

    Pillow's own conversion cuts grey values of more than 8 bits off at 255, which turns most of a 16-bit picture
    white without a word; here they are scaled.

    Args:
        picture: in any mode, loaded.
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: its pixels are floating-point numbers or need more than 16 bits, so that nobody knows which of
            them is white; or Pillow cannot convert its mode.
    """
    turn = _turn(picture) if upright else None
    rgb = _opaque(_eight_bits(picture)).convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def as_seen(picture: Image.Image) -> Image.Image:
    """Convert a person's picture to 8-bit RGB as a viewer shows it.

    It is turned as its EXIF orientation says, its colours are converted from its profile's to sRGB, and what is
    transparent is laid on white. An orientation or a profile that is damaged is as none.

    Args:
        picture: in any mode, loaded.

    Raises:
        ValueError: as :func:`to_rgb`.
    """
    turn, profile = _turn(picture), picture.info.get("icc_profile")
    small = _eight_bits(picture)
    rgb = _in_srgb(_opaque(small), profile)
    if small.mode in _TRANSPARENT or "transparency" in small.info:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), small.convert("RGBA").getchannel("A"))
    return rgb if turn is None else rgb.transpose(turn)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of more bits scaled to 8; other pictures as they are."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > _WHITE:
        raise ValueError(f"its pixels go from {grey.min()} to {grey.max()}; expected 8 or 16 bits")
    tags: Any = getattr(picture, "tag_v2", {})
    white = _WHITE_12 if tags.get(_BITS_PER_SAMPLE) == (12,) else _WHITE
    return Image.fromarray((grey * 255 / white).round().astype(np.uint8))


def _opaque(picture: Image.Image) -> Image.Image:
    """Without its transparency, in a mode that profiles are for if there is one; what lay below shows."""
    if picture.mode == "LA":
        return picture.convert("L")
    if picture.mode == "P" and "transparency" in picture.info:  # Pillow asks for this step, by a warning
        picture = picture.convert("RGBA")
    if picture.mode in {"P", "PA", "RGBA"}:
        return picture.convert("RGB")
    return picture


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright; Pillow itself has turned a TIFF, without always forgetting its orientation."""
    if picture.format == "TIFF":
        return None
    try:
        orientation: Any = picture.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except _DAMAGED as error:
        _LOG.debug("an EXIF orientation that cannot be read: %s", error)
        return None


def _in_srgb(picture: Image.Image, profile: Any) -> Image.Image:
    """An opaque picture as RGB, its colours from a profile's to sRGB where it has one that fits."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            modes = _SPACES.get(source.profile.xcolor_space, ())
            if picture.mode in modes:
                given = picture if picture.mode == modes[0] else picture.convert(modes[0])
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(given, source, target, outputMode="RGB")
                if converted is not None:
                    return converted
        except (*_DAMAGED, ImageCms.PyCMSError, ImportError) as error:
            _LOG.debug("a colour profile that cannot be used: %s", error)
    return picture.convert("RGB")
