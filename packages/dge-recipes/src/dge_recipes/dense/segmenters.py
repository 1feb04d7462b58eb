"""segmentation_models_pytorch's decoders on our backbones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dge_recipes.config.head import SEGMENTERS, HeadConfig
from dge_recipes.dense.backbones import build_maps, own_strides
from dge_recipes.errors import UserError

__all__ = ["Segmenter", "build_segmenter", "likeliest"]


class Encoder(nn.Module):
    """A backbone's maps in the form that segmentation_models_pytorch's decoders take, as its ``tu-`` encoders have it.

    Args:
        model: gives maps of four strides, finest first.

    Attributes:
        out_channels: of the image, of a map of half its size, which no decoder here looks at, and of the maps.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        maps: Any = model
        self.model = model
        self.out_channels = [3, 0, *maps.channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The images [B, 3, H, W], an empty map [B, 0, H / 2, W / 2], and the maps."""
        maps = self.model(images)
        half = images.new_empty(len(images), 0, images.shape[2] // 2, images.shape[3] // 2)
        return [images, half, *(maps.values() if isinstance(maps, dict) else maps)]


class Segmenter(nn.Module):
    """A class for every pixel.

    Args:
        encoder: gives the maps.
        decoder: segmentation_models_pytorch's: from the maps to one of the finest stride.
        segmentation_head: its classifier, which enlarges to the size of the images.
        multiple: sides of images are padded to a multiple of it, and the result cut again.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module, segmentation_head: nn.Module, multiple: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = encoder, decoder, segmentation_head
        self.multiple = multiple

    def forward(self, images: Tensor) -> Tensor:
        """Logits float [B, classes, H, W] of images float [B, 3, H, W]."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(padded)))
        return logits[:, :, :height, :width]


def build_segmenter(backbone: nn.Module, head: HeadConfig, num_classes: int) -> Segmenter:
    """A segmenter.

    ``semantic_fpn`` has the decoder of segmentation_models_pytorch's ``FPN``, half of whose channels are the
    classifier's; ``upernet`` that of its ``UPerNet``. Nothing is loaded from a network.

    Args:
        backbone: from :func:`~dge_recipes.dense.backbones.create_backbone`; it becomes part of the segmenter. The maps
            are a pyramid's own, or those of a simple feature pyramid over a vision transformer.
        head: the ``head`` section, of a segmenter's kind.
        num_classes: of pixels.

    Returns:
        The segmenter, in training mode.

    Raises:
        UserError: the head is none of a segmenter, or backbone and head do not go together.
    """
    if head.kind not in SEGMENTERS:
        raise UserError(f"head.kind: got {head.kind}, expected one of {', '.join(SEGMENTERS)} for segmentation")
    strides = head.strides or own_strides(backbone)
    if len(strides) != 4:
        raise UserError(f"head.strides: got {list(strides)}, expected four for {head.kind}")
    encoder = Encoder(build_maps(backbone, strides, head.channels, head.frozen_stages))
    try:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
    except ImportError as error:
        raise UserError(
            f'task=segmentation needs segmentation_models_pytorch ({error}): pip install "dge-recipes[dense]"'
        ) from error
    decoder, width = _decoder(head, encoder.out_channels)
    classifier = SegmentationHead(width, num_classes, kernel_size=1, upsampling=strides[0])
    initialize_decoder(decoder)
    initialize_head(classifier)
    return Segmenter(encoder, decoder, classifier, strides[-1])


def _decoder(head: HeadConfig, channels: list[int]) -> tuple[nn.Module, int]:
    """The decoder, and the channels of its map."""
    if head.kind == "upernet":
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        return UPerNetDecoder(encoder_channels=channels, encoder_depth=5, decoder_channels=head.channels), head.channels
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    if head.channels % 64:  # whose half is normalised in 32 groups
        raise UserError(f"head.channels: got {head.channels}, expected a multiple of 64 for semantic_fpn")
    decoder = FPNDecoder(
        encoder_channels=channels,
        encoder_depth=5,
        pyramid_channels=head.channels,
        segmentation_channels=head.channels // 2,
        dropout=head.dropout,
    )
    return decoder, head.channels // 2


def likeliest(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The likeliest class of every pixel.

    Args:
        logits: float [classes, h, w] of one image.
        size: (H, W) wanted, to which logits are resized bilinearly, in float32.

    Returns:
        int64 [H, W].
    """
    logits = logits.float()
    if tuple(size) != tuple(logits.shape[1:]):
        logits = F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    return logits.argmax(0)
