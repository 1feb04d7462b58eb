"""What the families of pyramids share: their grids, the reference's names of their stages, and their positions."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.families import Family, square_grid
from dge_models.macs import LayerMacs, ModelMacs, head_macs
from dge_models.pyramid import Pyramid, pyramid_input
from dge_models.pyramid_stage import PyramidStage, resize_positions
from dge_models.reference_keys import refuse_misfit, to_timm_keys
from dge_models.registration import Filter, create, data_config, register

__all__ = ["PyramidFamily", "PyramidKinds", "pyramid_configs", "register_pyramids"]

PyramidKinds = Mapping[str, tuple[type[Pyramid], str]]
"""By the pattern of a name, with ``{}`` for the size: the class, and what its documentation says of it."""

_DEPTHS = {
    "tiny": (2, 2, 2, 2),
    "small": (3, 4, 6, 3),
    "medium": (3, 4, 18, 3),
    "large": (3, 8, 27, 3),
}

# What only a pyramid has: numbered stages, in the reference's names and in timm's.
_STAGE = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<part>block|patch_embed|pos_embed)(?P<stage>[1-9])(?P<rest>$|\..*)")
_CLASS_TOKEN = re.compile(r"(?P<prefix>(?:.*\.)?)cls_token")


class PyramidFamily(Family):
    """A kind of pyramid, plain and with routed blocks.

    Attributes:
        own_layer: Name of a layer that the attention of each of its blocks has, and no other family's.
        routed_name: A registered model with routed blocks.
    """

    own_layer: ClassVar[str]
    routed_name: ClassVar[str]

    @abstractmethod
    def layer_macs(self, block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
        """The MACs of a block on a grid of (H, W)."""

    def pretrained_weights(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Bring pretrained weights to the model's names and sizes, for timm's pretrained loading.

        Args:
            state_dict: In the reference's or this package's layout.
            model: What they are for; as a backbone it may have fewer stages or no class token.

        Returns:
            Weights under the model's names, position embeddings resized bilinearly where the grid differs.

        Raises:
            ValueError: The weights are of another kind of model, or their split sets are not the model's.
        """
        refuse_misfit(state_dict, model, "state_dict: doesn't fit")
        return self.fit_positions(to_timm_keys(state_dict), model)

    def token_grid(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """That of the first stage, the finest."""
        return super().token_grid(model.stages[0], image_size)

    def input_size(self, model: Any) -> tuple[int, int] | None:
        """The pixels that the position embeddings are made for."""
        size: tuple[int, int] = model.img_size
        return size

    def routed_places(self, model: Any, image_size: tuple[int, int]) -> list[tuple[tuple[int, int], int]]:
        """Stage by stage."""
        image = torch.empty(1, 1, *image_size, device="meta")
        rows, cols = pyramid_input(image, model.img_size, model.smallest_size, model.dynamic_img_size).shape[2:]
        places: list[tuple[tuple[int, int], int]] = []
        for stage in model.stages:
            patch = stage.patch_embed.patch_size
            rows, cols = rows // patch[0], cols // patch[1]
            routed = sum(isinstance(block, DGEBlock) for block in stage.blocks)
            places += [((rows, cols), stage.num_prefix_tokens)] * routed
        return places

    def model_macs(self, model: Any, grid: tuple[int, int]) -> ModelMacs:
        """Blocks, patch embeddings with their norms, and the head; later stages' grids follow from the first's."""
        layers: list[LayerMacs] = []
        routed: list[bool] = []
        outside = head_macs(model.head)
        for index, stage in enumerate(model.stages):
            if index:
                patch = stage.patch_embed.patch_size
                grid = (grid[0] // patch[0], grid[1] // patch[1])
            outside += grid[0] * grid[1] * (stage.patch_embed.proj.weight.numel() + stage.pos_embed.shape[-1])
            num_tokens = stage.num_prefix_tokens + grid[0] * grid[1]
            layers += [self.layer_macs(block, num_tokens, grid) for block in stage.blocks]
            routed += [isinstance(block, DGEBlock) for block in stage.blocks]
        return ModelMacs(tuple(layers), tuple(routed), outside)

    def owns_keys(self, keys: Iterable[str]) -> bool:
        """Numbered stages, whose blocks have the family's own layer."""
        stage = r"(?:.*\.)?(?:block[1-9]|stages\.\d+\.blocks)\.\d+\.attn\."
        own = re.compile(rf"{stage}{self.own_layer}\.")
        return any(own.match(key) for key in keys)

    def to_timm_keys(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Stages get the numbers and names of timm's pyramids: ``block1.0`` becomes ``stages.0.blocks.0``."""
        last = max((int(match["stage"]) for key in state_dict if (match := _STAGE.fullmatch(key))), default=0)
        if not last:
            return state_dict
        out = {}
        for key, value in state_dict.items():
            if match := _STAGE.fullmatch(key):
                part = "blocks" if match["part"] == "block" else match["part"]
                key = f"{match['prefix']}stages.{int(match['stage']) - 1}.{part}{match['rest']}"
            elif match := _CLASS_TOKEN.fullmatch(key):
                key = f"{match['prefix']}stages.{last - 1}.cls_token"
            out[key] = value
        return out

    def fit_positions(self, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Bilinearly, stage by stage; a class token that the model lacks is left out."""
        fitted = dict(weights)
        for name, stage in model.named_modules():
            key = f"{name}.pos_embed"
            if not isinstance(stage, PyramidStage) or key not in fitted:
                continue
            stored, prefix = fitted[key], int(f"{name}.cls_token" in fitted)
            if prefix and stage.cls_token is None:
                del fitted[f"{name}.cls_token"]
                stored, prefix = stored[:, prefix:], 0
            if stored.shape != stage.pos_embed.shape and stored.shape[-1] == stage.pos_embed.shape[-1]:
                grid = square_grid(f"{key}: got", stored, prefix, stage.pos_embed.shape[1])
                stored = resize_positions(stored, grid, stage.grid_size, prefix)
            fitted[key] = stored
        return fitted

    def reason_against(self, model: nn.Module) -> str | None:
        """There is a routed one to create instead."""
        return f"it is a pyramid with blocks of its own; the routed one is created by name, as {self.routed_name}"


def pyramid_configs(kinds: PyramidKinds) -> Any:
    """timm's ``default_cfgs`` of a family's models in four sizes."""
    config = data_config(
        "stages.0.patch_embed.proj", min_input_size=(3, 32, 32), pool_size=(8, 8), fixed_input_size=False
    )
    return generate_default_cfgs({pattern.format(size): dict(config) for pattern in kinds for size in _DEPTHS})


def register_pyramids(module: str, title: str, kinds: PyramidKinds, pretrained_filter: Filter) -> None:
    """Give a module the functions of its models in four sizes, and timm their entry points.

    Args:
        module: Its name; its ``default_cfgs`` are there, from :func:`pyramid_configs`.
        title: Of the family, for their documentation.
        kinds: What there is of every size.
        pretrained_filter: Brings pretrained weights to a model's names and sizes.
    """
    models = {pattern.format(size): (size, *kind) for pattern, kind in kinds.items() for size in _DEPTHS}

    def build(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
        size, model_class, _ = models[name]
        settings = {"depths": _DEPTHS[size], **kwargs}
        return create(model_class, name, pretrained, pretrained_filter, (0, 1, 2, 3), settings)

    for name, (size, _, doc) in models.items():
        register(module, name, f"{title}-{size.capitalize()}, depths {_DEPTHS[size]}: {doc}.", build)
