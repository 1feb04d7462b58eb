"""A plain vision transformer as an encoder of segmentation_models_pytorch, which wants a pyramid."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dge_models.feature_pyramid import SimpleFeaturePyramid

__all__ = ["SegmentationEncoder"]

_STRIDES = (4, 8, 16, 32)


class SegmentationEncoder(nn.Module):
    """:class:`SimpleFeaturePyramid` in the form of segmentation_models_pytorch's encoders.

    That library takes encoders of one's own by name, from a dict of it:

    .. code-block:: python

        smp.encoders.encoders["vit"] = {
            "encoder": functools.partial(dge_models.SegmentationEncoder, pyramid),
            "params": {},
            "pretrained_settings": {},
        }
        model = smp.UPerNet("vit", encoder_weights=None, classes=150)

    Pyramids of this package need nothing of this: ``encoder_name="tu-pvt_dge_s124_tiny_256"``.

    Args:
        pyramid: With maps of strides 4, 8, 16 and 32, as by default with patches of 16 pixels. It is kept, not copied.
        depth: Maps of the image's resolution halved so many times are the last ones, 2 to 5.
        output_stride: 32; smaller ones, by dilated convolutions, are not to be had.

    Attributes:
        pyramid: As given.
        out_channels: Of the maps that :meth:`forward` gives.
        output_stride: Of the last one; the library asks for images of a multiple of it.

    Raises:
        ValueError: The pyramid has other strides, or a number is not as above.
    """

    def __init__(self, pyramid: SimpleFeaturePyramid, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        patch = pyramid.backbone.patch_embed.patch_size
        strides = [tuple(side / scale for side in patch) for scale in pyramid.scales]
        if strides != [(stride, stride) for stride in _STRIDES]:
            raise ValueError(f"pyramid: got maps of strides {strides}; expected {_STRIDES}, choose its scales")
        if not 2 <= depth <= 5:
            raise ValueError(f"depth: got {depth}; expected 2 to 5")
        if output_stride != 32:
            raise ValueError(f"output_stride: got {output_stride}; expected 32, a transformer has no dilation")
        self.pyramid = pyramid
        self.in_channels: int = pyramid.backbone.patch_embed.proj.in_channels
        self.out_channels = [self.in_channels, 0, *[pyramid.out_channels] * (depth - 1)]
        self.output_stride = 2**depth

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of images, finest first.

        Args:
            images: [B, 3, H, W], sides a multiple of 32.

        Returns:
            The images, an empty map [B, 0, H/2, W/2], and maps [B, C, H/4, W/4] and so on.
        """
        height, width = images.shape[2:]
        empty = images.new_empty(images.shape[0], 0, height // 2, width // 2)
        maps = list(self.pyramid(images).values())
        return [images, empty, *maps[: len(self.out_channels) - 2]]

    def set_in_channels(self, in_channels: int, pretrained: Any = True) -> None:
        """What the library calls with the number of channels that a model was asked for.

        Raises:
            ValueError: The transformer takes another number.
        """
        if in_channels != self.in_channels:
            raise ValueError(
                f"in_channels: got {in_channels}; expected {self.in_channels}, as the transformer was made (in_chans)"
            )
