"""What timm's tools ask of a model, for pyramids: heads, sizes, parameter groups, features of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx
from timm.layers.helpers import to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.pvt_stage import spatial_map
from dge_models.routed import noise_per_block
from dge_models.routing import Routing
from dge_models.vit import image_size

__all__ = ["PyramidContract"]

_POOLS = ("", "token", "avg", "avgmax", "max")
_FORMATS = ("NCHW", "NHWC", "NLC")


def pyramid_input(images: Tensor, made_for: tuple[int, int], smallest: int, any_size: bool) -> Tensor:
    """The images themselves; a ValueError if a pyramid can't take them."""
    size = image_size(images)
    # The usual case first: by this comparison torch.compile learns that the size is a constant.
    if size[0] == made_for[0] and size[1] == made_for[1]:
        return images
    got = f"images: got {size[0]} × {size[1]} pixels"
    if not any_size:
        raise ValueError(f"{got}; expected {made_for[0]} × {made_for[1]} (dynamic_img_size is off)")
    if size[0] < smallest or size[1] < smallest:
        raise ValueError(f"{got}; expected at least {smallest} × {smallest}, one token in the last stage")
    return images


# They look at values or take a grid apart, which torch.fx can't trace through. (timm's registry of such functions
# acts only in the module that defines the traced forward.)
torch.fx.wrap("pyramid_input")
torch.fx.wrap("spatial_map")


class PyramidContract(nn.Module):
    """Methods that have timm's names and meanings; the model's constructor sets the attributes."""

    stages: Any  # nn.Sequential of PyramidStage
    norm: nn.Module
    head: nn.Module
    num_classes: int
    num_features: int
    head_hidden_size: int
    embed_dim: int
    embed_dims: tuple[int, ...]
    num_prefix_tokens: int
    global_pool: str
    img_size: tuple[int, int]
    dynamic_img_size: bool
    smallest_size: int
    feature_info: list[dict[str, Any]]

    def _check_pool(self, pool: str) -> str:
        if pool not in _POOLS:
            raise ValueError(f"global_pool: got {pool!r}; expected one of {', '.join(map(repr, _POOLS))}")
        if pool == "token" and not self.num_prefix_tokens:
            raise ValueError("global_pool: got 'token'; expected another pooling, the model has no class token")
        return pool

    def _new_head(self, device: Any, dtype: Any) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, device=device, dtype=dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates (timm's convention)."""
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.(?:patch_embed|pos_embed|cls_token)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass, to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head.

        Args:
            num_classes: Of the new head; 0 leaves the pooled features.
            global_pool: Another pooling, or None to keep it.

        Raises:
            ValueError: `global_pool` is unknown or needs a class token.
        """
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        weight = self.stages[0].patch_embed.proj.weight
        self.head = self._new_head(weight.device, weight.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize the position embeddings for good, to train or evaluate at another size.

        Args:
            img_size: Pixels; None changes nothing.
            patch_size: Not supported: every stage has its own.

        Raises:
            ValueError: `img_size` is too small, or a patch size is given.
        """
        if patch_size is not None:
            raise ValueError(f"patch_size: got {patch_size}; expected None, a pyramid's patches can't be changed")
        size: tuple[int, int] = self.img_size if img_size is None else to_2tuple(img_size)
        if min(size) < self.smallest_size:
            raise ValueError(f"img_size: got {size}; expected at least {self.smallest_size} pixels per side")
        for stage, info in zip(self.stages, self.feature_info, strict=False):
            stage.set_grid_size((size[0] // info["reduction"], size[1] // info["reduction"]))
        self.img_size = size

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The outputs of chosen stages, finest first.

        Args:
            x: [B, C, H, W] images.
            indices: Stages to return: indices, negative ones from the end; an int for the last so many;
                None for all.
            return_prefix_tokens: Pair every map with its stage's prefix tokens [B, T, C] (T is 0 but in the
                last stage).
            norm: Apply the final norm to the last stage's map, the only one that it fits.
            stop_early: Run no stage beyond the last one that is returned.
            output_fmt: "NCHW", "NHWC" or "NLC".
            intermediates_only: Return the list alone.
            output_dict: Return a dict, as timm's vision transformers do.

        Returns:
            (features, intermediates); features as :meth:`forward_features` returns them, or with
            `stop_early` the tokens of the last stage that ran.

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        if output_fmt not in _FORMATS:  # timm's own enumeration compares equal to its strings
            raise ValueError(f"output_fmt: got {output_fmt!r}; expected one of {', '.join(map(repr, _FORMATS))}")
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else _listed(indices))
        tokens, _, outputs = self._run_stages(x, stages=last + 1 if stop_early else None)
        final = len(self.stages) - 1
        features = self.norm(tokens) if len(outputs) == len(self.stages) else tokens
        maps, prefixes = [], []
        for index in take:
            kept, grid = outputs[index]
            kept = self.norm(kept) if norm and index == final else kept
            prefix = self.stages[index].num_prefix_tokens
            prefixes.append(kept[:, :prefix])
            maps.append(_formatted(kept, grid, prefix, output_fmt))
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = features
            return result
        intermediates: list[Any] = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs of the chosen stages don't need.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Drop the final norm.
            prune_head: Drop the head.

        Returns:
            The chosen stages as indices from the start.
        """
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else _listed(indices))
        truncated = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if truncated:
            self.num_features = self.head_hidden_size = self.embed_dim = self.embed_dims[last]
            self.num_prefix_tokens = 0
        if prune_norm or truncated:
            self.norm = nn.Identity()
        if prune_head or truncated:
            self.reset_classifier(0, "")
        indices_from_start: list[int] = take
        return indices_from_start

    def _run_stages(
        self,
        images: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
        stages: int | None = None,
    ) -> tuple[Tensor, list[Routing], list[tuple[Tensor, tuple[int, int]]]]:
        """The last stage's tokens, the routings, and every stage's tokens with their grid."""
        x = pyramid_input(images, self.img_size, self.smallest_size, self.dynamic_img_size)
        routed = sum(isinstance(block, DGEBlock) for stage in self.stages for block in stage.blocks)
        pending = noise_per_block(noise, routed)
        routings: list[Routing] = []
        outputs: list[tuple[Tensor, tuple[int, int]]] = []
        tokens = x
        for index, stage in enumerate(list(self.stages)[:stages]):
            if index:
                x = spatial_map(tokens, outputs[-1][1], self.stages[index - 1].num_prefix_tokens)
            tokens, grid, of_stage = stage(x, noise=pending, return_routing=return_routing)
            outputs.append((tokens, grid))
            routings.extend(of_stage)
        return tokens, routings, outputs


def _listed(indices: Sequence[int] | None) -> list[int] | None:
    return None if indices is None else list(indices)


def _formatted(tokens: Tensor, grid: tuple[int, int], prefix: int, output_fmt: str) -> Tensor:
    if output_fmt == "NLC":
        return tokens[:, prefix:]
    spatial = spatial_map(tokens, grid, prefix)
    return spatial.contiguous() if output_fmt == "NCHW" else spatial.permute(0, 2, 3, 1).contiguous()
