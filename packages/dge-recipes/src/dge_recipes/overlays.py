"""Pictures of what a detector or a segmenter found, with the granularity that it was found at beside it."""

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dge_models.draw import enlarge
from dge_recipes.data.dense_targets import IGNORED

__all__ = ["class_color", "dense_overlay", "draw_classes", "draw_objects"]

_TURN = 0.618034  # of the colour circle from one class to the next: neighbours differ most
_TINT = 0.5
_LIKELY = 0.5  # a pixel of a predicted mask from this probability on
_TEXT, _GAP = 12, 6  # pixels
_DARK, _LIGHT = (20, 20, 20), (255, 255, 255)

_Color = tuple[int, int, int]


def dense_overlay(
    image: Image.Image | Tensor,
    prediction: Mapping[str, Tensor] | Tensor,
    routing: Image.Image | None = None,
    names: Sequence[str] | None = None,
    *,
    caption: str = "",
    threshold: float = 0.5,
    size: int = 384,
) -> Image.Image:
    """What was found in an image, and beside it how finely the image was looked at.

    Args:
        image: a picture, or float32 [3, H, W] in [0, 1].
        prediction: of a detector, as for :func:`draw_objects`; of a segmenter, as for :func:`draw_classes`.
        routing: a picture of the granularity, such as :func:`dge_models.draw_heat_map` draws; None: nothing beside it.
        names: of the classes; of a detector without the background.
        caption: below both.
        threshold: objects with a smaller score are not drawn.
        size: pixels that the longer side of the image has at least.

    Returns:
        An RGB picture.
    """
    if isinstance(prediction, Tensor):
        left = draw_classes(image, prediction, names, size=size)
    else:
        left = draw_objects(image, prediction, names, threshold=threshold, size=size)
    pictures = [left]
    if routing is not None:
        height = enlarge(image, size).height  # a legend below the left picture has nothing beside it
        width = max(1, round(routing.width * height / routing.height))
        pictures.append(routing.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    return _beside(pictures, caption)


def draw_objects(
    image: Image.Image | Tensor,
    prediction: Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    *,
    threshold: float = 0.5,
    size: int = 384,
) -> Image.Image:
    """Draw boxes with their classes and scores, and masks where there are some.

    Args:
        image: a picture, or float32 [3, H, W] in [0, 1].
        prediction: ``boxes`` [N, 4] as corners in the image's pixels, ``labels`` [N] from 1, ``scores`` [N] (left out
            for true objects), and where known ``masks`` as probabilities [N, 1, H, W] or bool [N, H, W].
        names: of the classes, label 1 first; None: their numbers are shown.
        threshold: objects with a smaller score are not drawn.
        size: pixels that the longer side of the result has at least.

    Returns:
        An RGB picture, the image enlarged without interpolation.
    """
    picture = enlarge(image, size)
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[-2:]
    labels = prediction["labels"].tolist()
    scores = prediction["scores"].tolist() if "scores" in prediction else [None] * len(labels)
    # The likeliest is drawn last, above the others.
    shown = sorted(
        (place for place, score in enumerate(scores) if score is None or score >= threshold),
        key=lambda place: scores[place] or 0.0,
    )
    if "masks" in prediction:
        masks = prediction["masks"].detach().cpu().reshape(len(labels), *prediction["masks"].shape[-2:])
        for place in shown:
            mask = masks[place] >= _LIKELY if masks.is_floating_point() else masks[place] != 0
            picture = _tinted(picture, mask, class_color(labels[place]))
    pen, font = ImageDraw.Draw(picture), _font()
    across, down = picture.width / width, picture.height / height
    for place in shown:
        left, top, right, bottom = prediction["boxes"][place].tolist()
        corners = (
            left * across,
            top * down,
            max(left * across, right * across - 1),
            max(top * down, bottom * down - 1),
        )
        color = class_color(labels[place])
        pen.rectangle(corners, outline=color, width=2)
        name = str(labels[place]) if names is None else names[labels[place] - 1]
        text = name if scores[place] is None else f"{name} {scores[place]:.0%}"
        box = pen.textbbox((0, 0), text, font=font)
        y = corners[1] - box[3] - 2 if corners[1] >= box[3] + 2 else corners[1]
        x = max(0.0, min(corners[0], picture.width - box[2] - 4))
        pen.rectangle((x, y, x + box[2] + 3, y + box[3] + 2), fill=color)
        pen.text((x + 2, y), text, fill=_DARK, font=font)
    return picture


def draw_classes(
    image: Image.Image | Tensor, mask: Tensor, names: Sequence[str] | None = None, *, size: int = 384
) -> Image.Image:
    """Tint every pixel by its class, with a legend of the classes that occur below.

    Args:
        image: a picture, or float32 [3, h, w] in [0, 1].
        mask: integer [H, W] of any size, the class of each pixel. Class 0 stays untinted if it is called background,
            and ignored pixels stay so in any case.
        names: of the classes, class 0 first; None: their numbers are shown.
        size: pixels that the longer side of the result has at least.

    Returns:
        An RGB picture, the image enlarged without interpolation.
    """
    picture, mask = enlarge(image, size), mask.detach().cpu()
    found = [number for number in mask.unique().tolist() if number != IGNORED]
    plain = {0} if names is not None and names[0] == "background" else set()
    for number in found:
        if number not in plain:
            picture = _tinted(picture, mask == number, class_color(number))
    entries = [(class_color(each), str(each) if names is None else names[each]) for each in found if each not in plain]
    return _with_legend(picture, entries)


def class_color(label: int) -> _Color:
    """The colour of a class; that of the next is far from it."""
    red, green, blue = colorsys.hsv_to_rgb((label * _TURN) % 1, 0.75 if label % 2 else 0.55, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _tinted(picture: Image.Image, mask: Tensor, color: _Color) -> Image.Image:
    """The picture, half of it `color` where the mask [H, W], of any size, holds."""
    shape = Image.fromarray(mask.to(torch.uint8).numpy() * np.uint8(round(255 * _TINT)))
    shape = shape.resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, color), picture, shape)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[_Color, str]]) -> Image.Image:
    """The picture with coloured names in lines below it."""
    if not entries:
        return picture
    font, line = _font(), _TEXT + _GAP
    places, x, y = [], _GAP, picture.height + _GAP
    for _, name in entries:
        width = _TEXT + _GAP + round(font.getlength(name)) + 2 * _GAP
        if x > _GAP and x + width > picture.width:
            x, y = _GAP, y + line
        places.append((x, y))
        x += width
    drawn = Image.new("RGB", (picture.width, y + line), _LIGHT)
    drawn.paste(picture)
    pen = ImageDraw.Draw(drawn)
    for (color, name), (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top, left + _TEXT, top + _TEXT), fill=color)
        pen.text((left + _TEXT + _GAP, top - 1), name, fill=_DARK, font=font)
    return drawn


def _beside(pictures: Sequence[Image.Image], caption: str) -> Image.Image:
    """Pictures in a row on white, and a line of text below them."""
    width = sum(each.width for each in pictures) + _GAP * (len(pictures) - 1)
    height = max(each.height for each in pictures)
    row = Image.new("RGB", (width, height + (2 * _GAP + _TEXT if caption else 0)), _LIGHT)
    left = 0
    for each in pictures:
        row.paste(each, (left, 0))
        left += each.width + _GAP
    if caption:
        ImageDraw.Draw(row).text((_GAP, height + _GAP - 1), caption, fill=_DARK, font=_font())
    return row


@cache
def _font() -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along; it has most alphabets, where Pillow's own has Latin alone."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _TEXT)
