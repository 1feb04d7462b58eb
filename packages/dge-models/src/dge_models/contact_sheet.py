"""Several images side by side: each one, its splits in every layer, and the mean over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dge_models.draw import draw_granularity, draw_groups, draw_heat_map, enlarge, split_colors
from dge_models.merging_trace import MergingTrace
from dge_models.routing import check_splits
from dge_models.trace import RoutingTrace

__all__ = ["contact_sheet", "draw_trace"]

_PAPER, _INK, _FAINT = (250, 250, 248), (32, 34, 40), (120, 124, 132)
_GAP, _TEXT = 10, 15


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    captions: Sequence[str] = (),
    *,
    title: str = "",
    splits: Sequence[int] | None = None,
) -> Image.Image:
    """Arrange pictures in a grid with headings.

    Args:
        rows: Pictures, the same number in every row; cells are as large as the largest.
        columns: A heading per column, or none.
        captions: A line under each row, or none.
        title: A line above everything, or none.
        splits: If given, a legend explains the colours of these splits.

    Returns:
        One RGB picture.

    Raises:
        ValueError: There is no picture, or the numbers of pictures, headings and captions don't agree.
    """
    _check_table(rows, columns, captions)
    cell_w = max(picture.width for row in rows for picture in row)
    cell_h = max(picture.height for row in rows for picture in row)
    line = _TEXT + _GAP
    top = _GAP + (line + 6 if title else 0) + (line if splits else 0) + (line if columns else 0)
    step = cell_h + _GAP + (line if captions else 0)
    texts = [_legend_width(splits), _width(title, _TEXT + 6), *(_width(caption) for caption in captions)]
    width = max(len(rows[0]) * (cell_w + _GAP) - _GAP, *texts) + 2 * _GAP
    sheet = Image.new("RGB", (width, top + len(rows) * step), _PAPER)
    pen = ImageDraw.Draw(sheet)
    y = _GAP
    if title:
        pen.text((_GAP, y), title, fill=_INK, font=_font(_TEXT + 6))
        y += line + 6
    if splits:
        _draw_legend(pen, (_GAP, y), check_splits(splits))
        y += line
    for col, heading in enumerate(columns):
        pen.text((_GAP + col * (cell_w + _GAP), y), heading, fill=_FAINT, font=_font(_TEXT))
    for index, row in enumerate(rows):
        for col, picture in enumerate(row):
            sheet.paste(picture, (_GAP + col * (cell_w + _GAP), top + index * step))
        if captions:
            pen.text((_GAP, top + index * step + cell_h + 4), captions[index], fill=_INK, font=_font(_TEXT))
    return sheet


def _check_table(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], captions: Sequence[str]) -> None:
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        lengths = [len(row) for row in rows]
        raise ValueError(f"rows: got {lengths} pictures per row; expected equally many, at least one")
    if columns and len(columns) != len(rows[0]):
        raise ValueError(f"columns: got {len(columns)} headings; expected {len(rows[0])}")
    if captions and len(captions) != len(rows):
        raise ValueError(f"captions: got {len(captions)}; expected one per row, {len(rows)}")


def _width(text: str, size: int = _TEXT) -> int:
    return math.ceil(_font(size).getlength(text))


def _legend_entries(splits: Sequence[int]) -> list[str]:
    return [f"{k} x {k} queries" if k > 1 else "1 query" for k in splits]


def _legend_width(splits: Sequence[int] | None) -> int:
    return sum(_TEXT + _GAP // 2 + _width(entry) + 2 * _GAP for entry in _legend_entries(splits or ()))


def _draw_legend(pen: ImageDraw.ImageDraw, at: tuple[int, int], splits: Sequence[int]) -> None:
    x, y = at
    for entry, color in zip(_legend_entries(splits), split_colors(splits), strict=True):
        pen.rectangle((x, y + 2, x + _TEXT, y + 2 + _TEXT), fill=color)
        pen.text((x + _TEXT + _GAP // 2, y), entry, fill=_INK, font=_font(_TEXT))
        x += _TEXT + _GAP // 2 + _width(entry) + 2 * _GAP


def draw_trace(
    images: Sequence[Image.Image | Tensor] | Tensor,
    trace: RoutingTrace | MergingTrace,
    splits: Sequence[int] = (4, 2, 1),
    *,
    layers: Sequence[int] | None = None,
    captions: Sequence[str] = (),
    title: str = "",
    size: int = 192,
) -> Image.Image:
    """Draw a trace: a row per image with the image, its splits in each layer, and the mean over the layers.

    Of a model that merges tokens: the image and its groups after each block.

    Args:
        images: What was traced, as pictures or tensors [1 or 3, H, W] with values in [0, 1].
        trace: What ``dge_models.trace`` returned for them.
        splits: The model's queries per region side, finest first; of no use to a model that merges.
        layers: Indices into the routed layers, or blocks, to draw; None draws all. The mean is over all.
        captions: A line under each row; by default the image's share of the static MACs.
        title: A line above everything.
        size: Pixels that the longer side of each picture has at least.

    Returns:
        One RGB picture.

    Raises:
        ValueError: The trace is of another number of images, or as in the functions that draw.
    """
    traced = trace.macs.shape[0]
    if len(images) != traced or not traced:
        raise ValueError(f"images: got {len(images)}; expected the {traced} of the trace, at least one")
    shares = [f"{share:.0%} of the static MACs" for share in (trace.macs / trace.static_macs).tolist()]
    if isinstance(trace, MergingTrace):
        blocks = range(len(trace.assignment)) if layers is None else layers
        pictures = [
            [enlarge(image, size), *(draw_groups(image, trace.assignment[block][index], size=size) for block in blocks)]
            for index, image in enumerate(images)
        ]
        return contact_sheet(
            pictures, ["image", *(f"block {block + 1}" for block in blocks)], captions or shares, title=title
        )
    chosen = range(len(trace.granularity)) if layers is None else layers
    rows = []
    for index, image in enumerate(images):
        maps = [granularity[index] for granularity in trace.granularity]
        mean = draw_heat_map(image, maps, splits, grids=trace.grids, size=size)
        layer_pictures = [
            draw_granularity(image, maps[layer], splits, grid=trace.grids[layer], size=size) for layer in chosen
        ]
        rows.append([enlarge(image, size), *layer_pictures, mean])
    return contact_sheet(
        rows,
        ["image", *(f"layer {layer + 1}" for layer in chosen), "mean of layers"],
        captions or shares,
        title=title,
        splits=splits,
    )
