"""Pictures of granularity: which region of an image got how many queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from dge_models.routing import check_splits, patch_sides, region_grid

__all__ = ["draw_granularity", "draw_groups", "draw_heat_map", "enlarge", "split_colors", "token_share"]

_Color = tuple[int, int, int]
# From few queries to many; distinguishable with the common kinds of colour blindness.
_RAMP: tuple[_Color, ...] = ((72, 88, 240), (22, 184, 168), (255, 138, 0))
# Opacity of a patch's fill, of the lines between patches, and of the frame around a region.
_TINT, _LINE, _FRAME = 56, 150, 255
# Brightness of the lines between merged groups.
_EDGE = 0.35


def _ramp(position: float) -> _Color:
    """The colour at a position from 0 (few queries) to 1 (many)."""
    at = min(max(position, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(at), len(_RAMP) - 2)
    start, end = _RAMP[low], _RAMP[low + 1]
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def split_colors(splits: Sequence[int] = (4, 2, 1)) -> list[_Color]:
    """One RGB colour per split, finest first: orange for the finest, then teal, blue for the coarsest."""
    steps = max(len(splits) - 1, 1)
    return [_ramp(1 - index / steps) for index in range(len(splits))]


def token_share(granularity: Tensor, splits: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Queries per token of each region: 1 at the finest split, 1/S² for a single query.

    Args:
        granularity: Integer [...], indices into `splits`.
        splits: Queries per region side, finest first.

    Returns:
        float32 [...], on the CPU. Regions that the grid's edge clips count as whole ones.
    """
    shares = torch.tensor([(k / splits[0]) ** 2 for k in check_splits(splits)])
    return shares[granularity.cpu().long()]


def _picture(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: got shape {tuple(image.shape)}; expected [1 or 3, H, W]")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            raise ValueError(f"image: got values from {low:.3g} to {high:.3g}; expected them within [0, 1]")
        image = (image * 255).round().to(torch.uint8)
    picture: Image.Image = to_pil_image(image)
    return picture.convert("RGB")


def enlarge(image: Image.Image | Tensor, size: int) -> Image.Image:
    """An image as an RGB picture, its pixels repeated until the longer side has `size` of them or more.

    Args:
        image: A picture, or a tensor [1 or 3, H, W] with values in [0, 1] or uint8.
        size: Pixels.

    Raises:
        ValueError: The tensor has another shape or other values.
    """
    picture = _picture(image)
    factor = max(1, -(-size // max(picture.width, picture.height)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _grid_of(granularity: Tensor, splits: tuple[int, ...], grid: tuple[int, int] | None) -> tuple[int, int]:
    """The token grid that a map belongs to, once the map fits it and the splits."""
    if granularity.ndim != 2 or not granularity.numel() or granularity.is_floating_point():
        got = f"{granularity.dtype} {tuple(granularity.shape)}"
        raise ValueError(f"granularity: got {got}; expected an integer map [Hr, Wr] of one image")
    regions = (granularity.shape[0], granularity.shape[1])
    grid = grid if grid is not None else (regions[0] * splits[0], regions[1] * splits[0])
    expected = region_grid(grid, splits)
    if regions != expected:
        raise ValueError(f"granularity: got {regions} regions; expected {expected} for a grid of {grid}")
    low, high = int(granularity.min()), int(granularity.max())
    if low < 0 or high >= len(splits):
        raise ValueError(f"granularity: got {low} to {high}; expected indices into the splits {splits}")
    return grid


def draw_granularity(
    image: Image.Image | Tensor,
    granularity: Tensor,
    splits: Sequence[int] = (4, 2, 1),
    *,
    grid: tuple[int, int] | None = None,
    size: int = 384,
) -> Image.Image:
    """Draw one layer's splits over an image: every query's patch is outlined in its split's colour.

    Args:
        image: A picture, or a tensor [1 or 3, H, W] with values in [0, 1] or uint8.
        granularity: Integer [Hr, Wr], indices into `splits`; what ``trace`` returns for one image and layer.
        splits: Queries per region side, finest first.
        grid: (H, W) of the token grid; by default all regions are whole.
        size: Pixels that the longer side of the result has at least.

    Returns:
        An RGB picture, the image enlarged without interpolation.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
    """
    splits = check_splits(splits)
    grid = _grid_of(granularity, splits, grid)
    picture = enlarge(image, size).convert("RGBA")
    overlay = Image.new("RGBA", picture.size)
    pen = ImageDraw.Draw(overlay)
    x_of = [round(x * picture.width / grid[1]) for x in range(grid[1] + 1)]
    y_of = [round(y * picture.height / grid[0]) for y in range(grid[0] + 1)]
    colors, sides = split_colors(splits), patch_sides(splits)
    for row, choices in enumerate(granularity.tolist()):
        for col, choice in enumerate(choices):
            top, left = row * splits[0], col * splits[0]
            bottom, right = min(top + splits[0], grid[0]), min(left + splits[0], grid[1])
            color, box = colors[choice], (x_of[left], y_of[top], x_of[right] - 1, y_of[bottom] - 1)
            pen.rectangle(box, fill=(*color, _TINT))
            for y in range(top + sides[choice], bottom, sides[choice]):
                pen.line((box[0], y_of[y], box[2], y_of[y]), fill=(*color, _LINE))
            for x in range(left + sides[choice], right, sides[choice]):
                pen.line((x_of[x], box[1], x_of[x], box[3]), fill=(*color, _LINE))
            pen.rectangle(box, outline=(*color, _FRAME))
    return Image.alpha_composite(picture, overlay).convert("RGB")


def _grids_of(
    granularities: Sequence[Tensor],
    splits: tuple[int, ...],
    grid: tuple[int, int] | None,
    grids: Sequence[tuple[int, int]] | None,
) -> list[tuple[int, int]]:
    if grids is None:
        return [_grid_of(granularity, splits, grid) for granularity in granularities]
    if grid is not None or len(grids) != len(granularities):
        given = "a grid beside them" if grid is not None else str(len(grids))
        raise ValueError(f"grids: got {given}; expected one per layer, {len(granularities)}, and no grid")
    return [_grid_of(granularity, splits, own) for granularity, own in zip(granularities, grids, strict=True)]


def _mean_share(granularities: Sequence[Tensor], splits: tuple[int, ...], grids: Sequence[tuple[int, int]]) -> Tensor:
    """Queries per token, averaged over the layers, for every token of the finest grid: float32 [H, W]."""
    finest = (max(rows for rows, _ in grids), max(cols for _, cols in grids))
    shares = []
    for granularity, (rows, cols) in zip(granularities, grids, strict=True):
        share = token_share(granularity, splits)
        tokens = share.repeat_interleave(splits[0], 0).repeat_interleave(splits[0], 1)[:rows, :cols]
        shares.append(F.interpolate(tokens[None, None], finest, mode="nearest-exact")[0, 0])
    return torch.stack(shares).mean(0)


def draw_heat_map(
    image: Image.Image | Tensor,
    granularities: Sequence[Tensor],
    splits: Sequence[int] = (4, 2, 1),
    *,
    grid: tuple[int, int] | None = None,
    grids: Sequence[tuple[int, int]] | None = None,
    size: int = 384,
) -> Image.Image:
    """Draw the mean number of queries per token over several layers, from blue (few) to orange (many).

    Args:
        image: As in :func:`draw_granularity`.
        granularities: One integer [Hr, Wr] per layer.
        splits: Queries per region side, finest first.
        grid: (H, W) of the token grid, where all layers have the same; by default all regions are whole.
        grids: One grid per layer instead, where they differ, as in a pyramid. Coarser ones are drawn at the
            resolution of the finest.
        size: Pixels that the longer side of the result has at least.

    Returns:
        An RGB picture. The colour is linear in the logarithm of the queries, as the splits are.

    Raises:
        ValueError: There is no layer, both or too few grids are given, or an argument has the wrong shape,
            type or range.
    """
    splits = check_splits(splits)
    if not granularities:
        raise ValueError("granularities: got none; expected one map per layer")
    share = _mean_share(granularities, splits, _grids_of(granularities, splits, grid, grids))
    lowest = token_share(torch.tensor(len(splits) - 1), splits).log()
    level = 1 - share.log() / lowest if len(splits) > 1 else torch.ones_like(share)
    picture = enlarge(image, size)
    colors = torch.tensor([[_ramp(value) for value in row] for row in level.tolist()], dtype=torch.uint8)
    heat = to_pil_image(colors.permute(2, 0, 1))
    heat = heat.resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), heat, 0.5)


def draw_groups(image: Image.Image | Tensor, assignment: Tensor, *, size: int = 384) -> Image.Image:
    """Draw one block's groups over an image: every group in the mean colour of its tokens, with lines between groups.

    Args:
        image: A picture, or a tensor [1 or 3, H, W] with values in [0, 1] or uint8.
        assignment: Integer [rows, columns] of the token grid, what ``trace`` returns for one image and block of a model
            that merges.
        size: Pixels that the longer side of the result has at least.

    Returns:
        An RGB picture.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
    """
    if assignment.ndim != 2 or not assignment.numel() or assignment.is_floating_point():
        got = f"{assignment.dtype} {tuple(assignment.shape)}"
        raise ValueError(f"assignment: got {got}; expected an integer map [rows, columns] of one image")
    picture = enlarge(image, size)
    rows, cols = assignment.shape
    groups = assignment.cpu().long()
    tokens = pil_to_tensor(picture.resize((cols, rows), Image.Resampling.BOX)).flatten(1).T.float()
    count = int(groups.max()) + 1
    sums = torch.zeros(count, 3).index_add(0, groups.flatten(), tokens)
    sizes = torch.zeros(count).index_add(0, groups.flatten(), torch.ones(rows * cols))
    means = (sums / sizes.clamp_min(1).unsqueeze(1))[groups]
    y = (torch.arange(picture.height) * rows // picture.height).clamp_max(rows - 1)
    x = (torch.arange(picture.width) * cols // picture.width).clamp_max(cols - 1)
    pixels, own = means[y][:, x], groups[y][:, x]
    edge = torch.zeros_like(own, dtype=torch.bool)
    edge[1:] |= own[1:] != own[:-1]
    edge[:, 1:] |= own[:, 1:] != own[:, :-1]
    pixels[edge] *= _EDGE
    return Image.fromarray(pixels.round().to(torch.uint8).numpy(), "RGB")
