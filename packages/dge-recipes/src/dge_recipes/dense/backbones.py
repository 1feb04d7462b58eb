"""Backbones that give maps of several strides: a pyramid's own, or those made from a vision transformer's one map."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from dge_models import RoutedModel, SimpleFeaturePyramid
from dge_recipes.config import ModelConfig
from dge_recipes.errors import UserError
from dge_recipes.models import create_model

__all__ = ["Maps", "build_maps", "create_backbone", "own_strides", "routed_backbone"]


def create_backbone(config: ModelConfig, *, init: bool = True) -> nn.Module:
    """The network of a recipe without a classifier, with the weights of ``config.init_from`` but their classifier's.

    Args:
        config: the ``model`` section.
        init: load ``config.init_from``; False where other weights follow anyway.

    Raises:
        UserError: an unknown model or argument, weights that do not fit, or a model that cannot be converted.
    """
    return create_model(config, 0, init=init)


def routed_backbone(network: nn.Module) -> RoutedModel | None:
    """The model with routed blocks in a detector or segmenter, whose budget counts; None without one."""
    return next((part for part in network.modules() if isinstance(part, RoutedModel)), None)


class Maps(nn.Module):
    """The maps of a pyramid's stages.

    Args:
        model: a pyramid with timm's ``feature_info`` and ``forward_intermediates``; what no map needs is dropped.
        strides: of the stages wanted, finest first.
        frozen: so many of the first stages get no gradient and stay in evaluation.

    Attributes:
        channels: of each map.
        strides: as given.
    """

    def __init__(self, model: nn.Module, strides: Sequence[int], frozen: int = 0) -> None:
        super().__init__()
        pyramid: Any = model
        infos = {info["reduction"]: (index, info["num_chs"]) for index, info in enumerate(pyramid.feature_info)}
        self._indices = [infos[stride][0] for stride in strides]
        self.channels = [infos[stride][1] for stride in strides]
        self.strides = tuple(strides)
        pyramid.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.model = pyramid
        self._frozen = frozen
        for stage in self._frozen_stages():
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps float [B, channels, H / stride, W / stride] of images [B, 3, H, W], sides rounded down."""
        maps: list[Tensor] = self.model.forward_intermediates(
            images, indices=self._indices, norm=False, intermediates_only=True
        )
        return maps

    def train(self, mode: bool = True) -> "Maps":
        """Frozen stages stay in evaluation, so that nothing of them is random."""
        super().train(mode)
        for stage in self._frozen_stages():
            stage.eval()
        return self

    def _frozen_stages(self) -> list[nn.Module]:
        return list(self.model.stages[: self._frozen])


class _ViTMaps(SimpleFeaturePyramid):
    """A simple feature pyramid whose frozen blocks stay in evaluation, and that says its strides."""

    def __init__(self, model: nn.Module, channels: int, strides: Sequence[int], patch: int, frozen: int) -> None:
        super().__init__(model, channels, [patch / stride for stride in strides], frozen_blocks=frozen)
        self.channels = [channels] * len(strides)
        self.strides = tuple(strides)

    def train(self, mode: bool = True) -> "_ViTMaps":
        """Frozen blocks stay in evaluation, so that nothing of them is random."""
        super().train(mode)
        for block in self.backbone.blocks[: self.frozen_blocks]:
            block.eval()
        return self


def own_strides(model: Any) -> tuple[int, ...]:
    """Strides of a pyramid's stages; of a vision transformer those of ViTDet: a quarter, a half, 1 and 2 patches."""
    if _patch_side(model) is None:
        return tuple(info["reduction"] for info in getattr(model, "feature_info", ()))
    return tuple(int(_patch_side(model) * scale) for scale in (0.25, 0.5, 1, 2))  # type: ignore[operator]


def build_maps(
    model: nn.Module, strides: Sequence[int], channels: int, frozen_stages: int = 0
) -> "Maps | SimpleFeaturePyramid":
    """Maps of several strides from a backbone, which becomes part of what is returned.

    Args:
        model: a pyramid, whose own maps these are, or a plain vision transformer, from whose last map they are made
            (``dge_models.SimpleFeaturePyramid``).
        strides: pixels of the image per cell, finest first, each twice the one before.
        channels: of maps made from a vision transformer's.
        frozen_stages: stages of a pyramid, or blocks of a vision transformer with its embedding, to freeze.

    Raises:
        UserError: the model is neither, has no such strides, or fewer stages than are to be frozen.
    """
    if not strides or any(fine * 2 != coarse for fine, coarse in pairwise(strides)):
        raise UserError(f"head.strides: got {list(strides)}, expected each to be twice the one before, such as 8, 16")
    patch = _patch_side(model)
    if patch is not None:
        try:
            return _ViTMaps(model, channels, strides, patch, frozen_stages)
        except ValueError as error:
            raise UserError(f"head: {error}") from error
    known = [info["reduction"] for info in getattr(model, "feature_info", [])]
    if not hasattr(model, "prune_intermediate_layers") or not hasattr(model, "stages") or not known:
        raise UserError(
            f"model.name: got a {type(model).__name__}, expected a pyramid or a plain vision transformer as backbone"
        )
    if not set(strides) <= set(known):
        raise UserError(f"head.strides: got {list(strides)}, expected some of the backbone's own, {known}")
    if frozen_stages > len(known):
        raise UserError(f"head.frozen_stages: got {frozen_stages}, expected 0 to {len(known)}, the backbone's stages")
    return Maps(model, strides, frozen_stages)


def _patch_side(model: Any) -> int | None:
    """Pixels per side of a vision transformer's patch; None of what is none."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(model, "blocks"):
        return None
    rows, cols = embed.patch_size
    if rows != cols:
        raise UserError(f"model: patches of {rows} x {cols} pixels, expected square ones under a detector or segmenter")
    return int(rows)
