"""Mixup and CutMix, through timm, with a randomness that the run's position fixes."""

from timm.data.mixup import Mixup

from dge_recipes.config.schema import Config
from dge_recipes.errors import UserError

__all__ = ["build_mixing"]


def build_mixing(config: Config, num_classes: int) -> Mixup | None:
    """Timm's ``Mixup`` for the recipe, or None where both alphas are zero.

    It turns (images [B, C, H, W], labels int64 [B]) into (mixed images, soft labels float32 [B, classes]),
    label smoothing included. It draws from NumPy's global generator, which the loop seeds at each step.

    Raises:
        UserError: the batch size is odd; timm mixes pairs.
    """
    mixing = config.mixing
    if mixing.mixup == 0 and mixing.cutmix == 0:
        return None
    if config.train.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: train.batch_size must be even, got {config.train.batch_size}")
    return Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        prob=mixing.prob,
        switch_prob=mixing.switch_prob,
        label_smoothing=config.train.label_smoothing,
        num_classes=num_classes,
    )
