"""A pyramid of feature maps from the one map of a plain vision transformer, for detectors and segmenters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from dge_models import padding
from dge_models.canvas import at_own_sizes
from dge_models.single_grid import image_size

__all__ = ["SimpleFeaturePyramid"]

_SCALES = (4.0, 2.0, 1.0, 0.5)


class SimpleFeaturePyramid(padding.FollowsPadding):
    """A vision transformer and, on its last map, convolutions that give maps of several strides.

    Every map comes from the last tokens alone: transposed convolutions double the resolution, max pooling halves it,
    and two convolutions with norms bring it to one width. torchvision's detectors take it as their ``backbone``. The
    budget of a routed transformer inside is reached through :func:`collect_routings`.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3.

    Args:
        model: timm's plain vision transformer, routed or not; kept as it is, as ``backbone``. Only with
            ``dynamic_img_size=True`` does it take images of other sizes than its own.
        out_channels: Channels of every map.
        scales: Resolutions of the maps relative to the token grid, finest first: powers of two. With patches of 16
            pixels the default gives strides of 4, 8, 16 and 32.
        frozen_blocks: So many of the first blocks, and the embedding, get no gradient; 0 leaves everything trainable.

    Attributes:
        backbone: The transformer.
        out_channels: As given; torchvision's detectors read it.
        scales: As given.

    Raises:
        ValueError: The model has no single token grid, or a number is out of range.
    """

    def __init__(
        self, model: nn.Module, out_channels: int = 256, scales: Sequence[float] = _SCALES, *, frozen_blocks: int = 0
    ) -> None:
        super().__init__()
        backbone: Any = model
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if grid is None or not isinstance(getattr(model, "blocks", None), nn.Sequential):
            raise ValueError(
                f"model: got {type(model).__name__}; expected a vision transformer with one token grid (pyramids such "
                "as PVT give maps of several strides by themselves: features_only=True)"
            )
        depth = len(backbone.blocks)
        if not 0 <= frozen_blocks <= depth:
            raise ValueError(f"frozen_blocks: got {frozen_blocks}; expected 0 to {depth}, the model's blocks")
        if out_channels < 1:
            raise ValueError(f"out_channels: got {out_channels}; expected at least 1")
        self.backbone: Any = backbone
        self.out_channels = out_channels
        self.levels = nn.ModuleList(_level(backbone.embed_dim, out_channels, scale) for scale in scales)
        if len(self.levels) == 0:
            raise ValueError("scales: got none; expected at least one")
        self.scales = tuple(float(scale) for scale in scales)
        self._coarsest = max(1, round(1 / min(self.scales)))
        self.frozen_blocks = frozen_blocks
        if frozen_blocks:
            embedding = [
                parameter
                for name, parameter in backbone.named_parameters()
                if name.startswith("patch_embed.") or name in ("cls_token", "reg_token", "dist_token", "pos_embed")
            ]
            blocks = [parameter for block in backbone.blocks[:frozen_blocks] for parameter in block.parameters()]
            for parameter in embedding + blocks:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of images.

        Args:
            images: [B, 3, H, W] of any floating dtype that the model takes. Sides that are no multiple of a patch are
                padded with zeros at the right and the bottom.

        Returns:
            float [B, out_channels, h, w] by "0", "1", …, in the order of `scales`; h and w are the token grid's sides
            times the scale, rounded down, and at least 1.

        Raises:
            ValueError: The model does not take images of this size.
        """
        out: OrderedDict[str, Tensor] = at_own_sizes(self, self._maps, images) if padding.in_use else self._maps(images)
        return out

    def size_multiple(self) -> tuple[int, int]:
        """One patch, and what is one pixel of the coarsest map."""
        rows, cols = self.backbone.patch_embed.patch_size
        return rows * self._coarsest, cols * self._coarsest

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rounded up to whole patches."""
        rows, cols = self.backbone.patch_embed.patch_size
        return size[0] + -size[0] % rows, size[1] + -size[1] % cols

    def _maps(self, images: Tensor) -> OrderedDict[str, Tensor]:
        size = image_size(images)
        backbone = self.backbone
        rows, cols = backbone.patch_embed.patch_size
        images = F.pad(images, (0, -size[1] % cols, 0, -size[0] % rows))
        height, width = images.shape[2:]
        if not getattr(backbone, "dynamic_img_size", False) and (height, width) != backbone.patch_embed.img_size:
            raise ValueError(
                f"images: got {size[0]} × {size[1]} pixels; expected {backbone.patch_embed.img_size}, the model's own "
                "size (one that is created with dynamic_img_size=True takes others)"
            )
        tokens: Tensor = backbone.forward_features(images)
        grid = (height // rows, width // cols)
        map_ = torch.unflatten(tokens[:, backbone.num_prefix_tokens :], 1, grid).permute(0, 3, 1, 2)
        return OrderedDict((str(index), level(map_)) for index, level in enumerate(self.levels))


def _level(width: int, out_channels: int, scale: float) -> nn.Sequential:
    """What makes the map of one scale from that of the tokens."""
    layers: list[nn.Module] = []
    left = scale
    while left >= 2:
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        narrower = max(width // 2, 1)
        layers.append(nn.ConvTranspose2d(width, narrower, kernel_size=2, stride=2))
        width, left = narrower, left / 2
    while 0 < left <= 0.5:
        # A last row or column that is alone is a patch of its own where there is nothing else.
        layers.append(_Halve())
        left *= 2
    if left != 1:
        raise ValueError(f"scales: got {scale}; expected powers of two, such as {_SCALES}")
    layers += [nn.Conv2d(width, out_channels, kernel_size=1, bias=False), LayerNorm2d(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers)


class _Halve(nn.MaxPool2d):
    """Halve both sides, down to 1."""

    def __init__(self) -> None:
        super().__init__(kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, 2, padding=0, ceil_mode=min(x.shape[2:]) < 2)
