"""What the method's authors published, to put beside what is measured."""

from dataclasses import dataclass

from dge_recipes.config import Config, ImageData

__all__ = ["Published", "published_row"]


@dataclass(frozen=True)
class Published:
    """A row of the published table: ImageNet-1k validation at 256 x 256, the budget's target 0.5.

    Attributes:
        acc1, acc5: accuracy in percent.
        macs: mean multiply-accumulates per image.
    """

    acc1: float
    acc5: float
    macs: float


# Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021.
_ROWS = {
    "deit_tiny_patch16_256": Published(73.2, 91.8, 1.7e9),
    "deit_dge_s124_tiny_patch16_256": Published(73.2, 91.7, 1.1e9),
    "deit_small_patch16_256": Published(80.6, 95.4, 6.1e9),
    "deit_dge_s124_small_patch16_256": Published(80.1, 95.0, 3.5e9),
}
_IMAGENET_CLASSES = 1000


def published_row(config: Config, num_classes: int) -> Published | None:
    """The published row that an evaluation can be compared with, or None where there is none.

    Args:
        config: model and data of the evaluation; converted models and other image sizes have no row.
        num_classes: classes of the data set; the published ones are those of ImageNet.
    """
    comparable = isinstance(config.data, ImageData) and config.data.image_size == 256 and config.model.convert is None
    return _ROWS.get(config.model.name) if comparable and num_classes == _IMAGENET_CLASSES else None
