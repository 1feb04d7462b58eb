"""Families of backbones: what one kind of model alone knows, behind one protocol."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dge_models.encoder import DGEBlock

if TYPE_CHECKING:
    from dge_models.macs import ModelMacs

__all__ = ["BLOCK", "Family", "families", "family_of", "find_family", "fit_one_grid", "has_blocks", "register_family"]
__all__ += ["square_grid"]

BLOCK = r"(?!.*\bstages\.\d)(?:.*\.)?blocks\.\d+\."
"""How names of parameters in blocks start, of transformers without stages; prefixes may precede."""


class Family(ABC):
    """The facts of one kind of backbone; nothing else in this package asks which kind a model is.

    The defaults are those of a transformer on one token grid with timm's attribute names (``patch_embed``,
    ``pos_embed``, ``num_prefix_tokens``, ``no_embed_class``). A new family is a file that defines one and passes it to
    :func:`register_family`, and the import of that file in ``dge_models/__init__.py``.

    Attributes:
        models: The classes that it serves, subclasses included.
        converts: Plain classes that :func:`from_timm` converts, exactly these, and what they become.
        weights: What its weights are called where another family's model refuses them.
        wanted: What is expected where one of its models refuses others; {} is the model's class.
    """

    models: ClassVar[tuple[type[nn.Module], ...]]
    converts: ClassVar[Mapping[type[nn.Module], type[nn.Module]]] = {}
    weights: ClassVar[str]
    wanted: ClassVar[str] = "weights of a {}"

    @abstractmethod
    def model_macs(self, model: Any, grid: tuple[int, int]) -> ModelMacs:
        """The MACs of a model whose first block has a token grid of (H, W), see :func:`dge_models.macs.model_macs`."""

    @abstractmethod
    def owns_keys(self, keys: Iterable[str]) -> bool:
        """Whether these are names of one of its models' parameters, in the reference's layout or in timm's."""

    def to_timm_keys(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of this family from the reference's layout to timm's; all others unchanged. Prefixes may precede."""
        return state_dict

    def token_grid(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the first block's token grid, for images of this many pixels."""
        rows, cols = model.patch_embed.dynamic_feat_size(image_size)
        return rows, cols

    def input_size(self, model: Any) -> tuple[int, int] | None:
        """(H, W) in pixels of the images that a model is made for; None if it takes any."""
        size: tuple[int, int] | None = model.patch_embed.img_size
        return size

    def routed_places(self, model: Any, image_size: tuple[int, int]) -> list[tuple[tuple[int, int], int]]:
        """Where the routed blocks are, in network order: the token grid (H, W), and the number of prefix tokens.

        Args:
            model: With routed blocks.
            image_size: (H, W) in pixels.

        Raises:
            ValueError: The model takes no images of this size.
        """
        own = self.input_size(model)
        if getattr(model.patch_embed, "strict_img_size", False) and own is not None and tuple(image_size) != tuple(own):
            raise ValueError(f"image_size: got {image_size}; expected {own}, this model takes no other size")
        grid = self.token_grid(model, image_size)
        if min(grid) < 1:
            raise ValueError(f"image_size: got {image_size}; expected at least one patch")
        return [(grid, model.num_prefix_tokens) for block in model.blocks if isinstance(block, DGEBlock)]

    def fit_positions(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Resize position embeddings to a model's grid, prefix tokens kept.

        Args:
            weights: Under the model's names.
            model: What they are for.

        Raises:
            ValueError: A position embedding is neither of the model's size nor of a square grid.
        """
        return fit_one_grid(weights, model)

    def reason_against(self, model: nn.Module) -> str | None:
        """What stands against converting a model, None if nothing does that shows before its attentions are looked at.

        Args:
            model: Of one of the classes in `converts`, or of another class that the family serves.
        """
        return None


def fit_one_grid(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """:meth:`Family.fit_positions` of a model on one token grid with timm's attribute names, of whatever family."""
    fitted, own = dict(weights), getattr(model, "pos_embed", None)
    stored = fitted.get("pos_embed")
    if stored is None or own is None or stored.ndim != 3 or stored.shape[::2] != own.shape[::2]:
        return fitted
    if stored.shape != own.shape:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        square_grid("pos_embed: got a position embedding of", stored, prefix, own.shape[1])
        # Without antialiasing, as the authors fine-tune.
        fitted["pos_embed"] = resample_abs_pos_embed(
            stored, list(model.patch_embed.grid_size), num_prefix_tokens=prefix, antialias=False
        )
    return fitted


def square_grid(got: str, stored: Tensor, prefix: int, expected: int) -> tuple[int, int]:
    """The grid of a stored position embedding [1, T + H·W, C]; a ValueError if it is not square.

    Args:
        got: How the error starts, up to the number of tokens.
        stored: The embedding.
        prefix: T.
        expected: Tokens of the model's own.
    """
    side = math.isqrt(max(stored.shape[1] - prefix, 0))
    if side < 1 or side * side != stored.shape[1] - prefix:
        raise ValueError(
            f"{got} {stored.shape[1]} tokens; expected {expected} as in the model, or {prefix} and a square grid to "
            "resize"
        )
    return side, side


def has_blocks(keys: Iterable[str]) -> bool:
    """Whether any of these names is that of a parameter in a block, of a transformer without stages."""
    return any(re.match(BLOCK, key) for key in keys)


_families: list[Family] = []


def register_family(family: Family) -> None:
    """Make a family known, once, when its file is imported."""
    _families.append(family)


def families() -> tuple[Family, ...]:
    """All that are known."""
    return tuple(_families)


def find_family(model: nn.Module) -> Family | None:
    """The family of a model, None if it has none."""
    return next((family for family in _families if isinstance(model, family.models)), None)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ValueError: It has none, as wrappers such as DDP.
    """
    family = find_family(model)
    if family is None:
        known = ", ".join(kind.__name__ for family in _families for kind in family.models)
        raise ValueError(
            f"model: got {type(model).__name__}; expected a vision transformer or pyramid, one of {known} (of a "
            "wrapper such as DDP, pass the module inside)"
        )
    return family
