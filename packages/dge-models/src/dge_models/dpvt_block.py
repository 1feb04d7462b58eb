"""The blocks of DPVT, plain and routed: every token reads a few points of the value map, found by its own offsets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dge_kernels import QueryPlan
from dge_models.attention import Kernel, KnownAttention
from dge_models.encoder import DGEBlock, Heads, Patches

__all__ = ["DGEDeformableBlock", "DeformableAttention", "DeformableBlock"]
__all__ += ["patch_centres", "sample_packed_values", "sample_values"]


def _corners(place: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two cells around a place in one direction: their indices, kept inside, and shares, 0 outside."""
    place = place.clamp(-1, length)  # further out nothing is read either, and integers can hold it
    start = place.detach().floor()
    share = place - start
    # Clamped once more as integers: a place that is not a number must not become an index.
    first = start.int().clamp(-1, length)
    cells = torch.stack([first, first + 1], dim=-1)
    inside = (cells >= 0) & (cells < length)
    return cells.clamp(0, length - 1), torch.stack([1 - share, share], dim=-1) * inside


def sample_values(points: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of bilinear samples of value maps.

    A corner outside the map counts as zero. At whole numbers the gradient of a place is that of the cell to the right
    and below.

    Args:
        points: [B, F, h, P, 2], x to the right and y down, in tokens; whole numbers are the centres of tokens.
        weights: [B, F, h, P], of the dtype of `points`.
        values: [B, H, W, h, d], converted to that dtype for the sum.

    Returns:
        [B, F, h, d], in the dtype of `values`.
    """
    batch, queries = points.shape[0], points.shape[1]
    images = torch.arange(batch, device=points.device, dtype=torch.int32).unsqueeze(1).expand(-1, queries).flatten()
    mixed = sample_packed_values(points.flatten(0, 1), weights.flatten(0, 1), values, images)
    return mixed.view(batch, queries, values.shape[3], values.shape[4])


def _sample_with_grid(points: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """:func:`sample_values` by ``grid_sample``, which copies every sample before they are summed."""
    rows, cols, heads = values.shape[1], values.shape[2], values.shape[3]
    x, y = (2 * points[..., 0] + 1) / cols - 1, (2 * points[..., 1] + 1) / rows - 1
    places = torch.stack([x, y], dim=-1).transpose(1, 2).flatten(0, 1)
    maps = values.to(points.dtype).permute(0, 3, 4, 1, 2).flatten(0, 1)
    sampled = F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    mixed = (sampled * weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
    return torch.unflatten(mixed, 0, [-1, heads]).permute(0, 3, 1, 2).to(values.dtype)


def sample_packed_values(points: Tensor, weights: Tensor, values: Tensor, images: Tensor) -> Tensor:
    """:func:`sample_values` of packed queries, each of the map of its own image.

    Args:
        points: [Q, h, P, 2].
        weights: [Q, h, P].
        values: [B, H, W, h, d].
        images: Integer [Q].

    Returns:
        [Q, h, d].
    """
    rows, cols, heads, width = values.shape[1], values.shape[2], values.shape[3], values.shape[4]
    x, across = _corners(points[..., 0], cols)
    y, down = _corners(points[..., 1], rows)
    place = (images.int().view(-1, 1, 1, 1) * rows + y).unsqueeze(-1) * cols + x.unsqueeze(-2)
    head = torch.arange(heads, device=points.device, dtype=torch.int32).view(-1, 1, 1, 1)
    shares = (down * weights.unsqueeze(-1)).unsqueeze(-1) * across.unsqueeze(-2)
    # A bag is what one head of one query reads: four corners of each point. No copy of what is read is made.
    mixed = F.embedding_bag(
        (place * heads + head).flatten(2).flatten(0, 1),
        values.to(shares.dtype).reshape(-1, width),
        mode="sum",
        per_sample_weights=shares.flatten(2).flatten(0, 1),
    )
    return torch.unflatten(mixed, 0, [-1, heads]).to(values.dtype)


class DeformableAttention(nn.Module):
    """Mixes a few sampled values per head; their places and weights are linear in the query alone.

    Positions, softmax and sums are float32 at least, whatever the dtype of the tokens.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, on one level and with offsets in tokens, as the reference of Song
    et al., NeurIPS 2021, has it.

    Args:
        dim: C, the tokens' width.
        num_heads: Heads.
        num_points: P, points per head.
        offset_gradient: By what the gradient of the offsets is multiplied; the reference trains with 0.1.
        attn_drop: Dropout of the points' weights.
        proj_drop: Dropout after the output projection.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`, or there is no point.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_points: int = 4,
        offset_gradient: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; expected a divisor of the width, {dim}")
        if num_points < 1:
            raise ValueError(f"num_points: got {num_points}; expected at least 1")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.num_points, self.offset_gradient = num_points, float(offset_gradient)
        self.v = nn.Linear(dim, dim, **dd)
        self.attn_weight = nn.Linear(dim, num_heads * num_points, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.offsets = nn.Linear(dim, 2 * num_heads * num_points, **dd)

    def value_map(self, normed: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H·W, C] tokens to values [B, H, W, h, d]."""
        values = torch.unflatten(self.v(normed), -1, [self.num_heads, self.head_dim])
        return torch.unflatten(values, 1, [grid[0], grid[1]])

    def points(self, normed: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Where queries read, and how much of it they take.

        Args:
            normed: [..., C], normalised queries.
            centres: [..., 2] or what spreads to it: x and y of each query, in tokens.

        Returns:
            Points [..., h, P, 2] and weights [..., h, P], float32 or wider.
        """
        offsets = self.offsets(normed)
        if offsets.dtype != torch.float64:
            offsets = offsets.float()
        if self.offset_gradient != 1.0 and offsets.requires_grad:
            # The sum is exact: what is added is zero.
            offsets = offsets.detach() + self.offset_gradient * (offsets - offsets.detach())
        offsets = torch.unflatten(offsets, -1, [self.num_heads, self.num_points, 2])
        logits = torch.unflatten(self.attn_weight(normed), -1, [self.num_heads, self.num_points])
        weights = torch.softmax(logits.to(offsets.dtype), dim=-1)
        return centres.to(offsets.dtype).unsqueeze(-2).unsqueeze(-2) + offsets, self.attn_drop(weights)

    def mix(self, mixed: Tensor) -> Tensor:
        """The output projection of [..., h, d]."""
        result: Tensor = self.proj_drop(self.proj(mixed.flatten(-2)))
        return result

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention of all tokens.

        Args:
            x: [B, H·W, C], normalised.
            grid: (H, W).

        Returns:
            [B, H·W, C].
        """
        place = torch.arange(grid[0] * grid[1], device=x.device)
        points, weights = self.points(x, torch.stack([place % grid[1], place // grid[1]], dim=-1))
        return self.mix(sample_values(points, weights, self.value_map(x, grid)))


@register_notrace_module
class DeformableBlock(Block):
    """timm's ``Block`` with :class:`DeformableAttention`.

    Args:
        dim: C, the tokens' width.
        num_heads: Heads.
        num_points: See :class:`DeformableAttention`.
        offset_gradient: See there.
        attn_drop: See there.
        proj_drop: See there, and dropout in the MLP.
        device: Of the parameters.
        dtype: Of the parameters.
        **kwargs: What else timm's ``Block`` takes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_points: int = 4,
        offset_gradient: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # One head, which always fits: timm's attention is replaced.
        super().__init__(dim, 1, proj_drop=proj_drop, device=device, dtype=dtype, **kwargs)
        self.attn = DeformableAttention(
            dim,
            num_heads,
            num_points=num_points,
            offset_gradient=offset_gradient,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )

    # Places are rows and columns. (TorchScript reads what follows on the line of a type comment.)
    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0
    ) -> Tensor:
        """Run the block.

        Args:
            x: [B, H·W, C] tokens.
            grid: (H, W).
            num_prefix_tokens: 0; a token beside the grid has no place to read from.

        Returns:
            Tokens of the shape of `x`.
        """
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        result: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return result


def patch_centres(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean place of each patch's tokens.

    Args:
        patches: Integer [..., 3]: row, column and side, whole ones even where the grid's edge clips them.
        grid: (H, W).

    Returns:
        float32 [..., 2], x and y in tokens.
    """
    row, col, side = patches.unbind(-1)
    x = (col + (col + side).clamp(max=grid[1]) - 1) / 2
    y = (row + (row + side).clamp(max=grid[0]) - 1) / 2
    return torch.stack([x, y], dim=-1)


class DGEDeformableBlock(DGEBlock, DeformableBlock):  # type: ignore[misc]  # both know the grid; a routed one more
    """A deformable block whose queries route: a pooled query reads its points around its patch's centre.

    Offsets stay in tokens of the stage's grid, whatever the patch's side.
    """

    plain = DeformableBlock
    attention = KnownAttention(
        (DeformableAttention,),
        frozenset({"v", "attn_weight", "attn_drop", "proj", "proj_drop", "offsets"}),
        ("v", "attn_weight", "proj", "offsets"),
    )
    attn: DeformableAttention

    def make_keys(self, normed: Tensor, grid: tuple[int, int], positions: Any) -> Heads:
        """The value map, [B, H, W, h, d]; there are no keys."""
        return (self.attn.value_map(normed, grid),)

    def make_kernel(self, plan: QueryPlan | None) -> Kernel:
        """Maps points, weights and the value map to what is read."""
        if plan is not None:
            return partial(sample_packed_values, images=plan.patches[:, 0])
        # ONNX has bilinear sampling, and no bags.
        return _sample_with_grid if torch.compiler.is_exporting() else sample_values

    def attend(self, normed: Tensor, keys: Heads, kernel: Kernel, positions: Any, patches: Patches) -> Tensor:
        """What attention adds to the queries, a tensor of the shape of `normed`."""
        values = keys[0]
        points, weights = self.attn.points(normed, patch_centres(patches(), (values.shape[1], values.shape[2])))
        return self.attn.mix(kernel(points, weights, values))
