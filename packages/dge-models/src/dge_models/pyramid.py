"""What pyramids of transformer stages share: features, heads, sizes, and routing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from math import lcm
from operator import mul
from typing import TYPE_CHECKING, Any, cast

import torch.fx
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.helpers import to_2tuple
from timm.layers.pool1d import global_pool_nlc
from timm.layers.weight_init import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dge_models import listening, padding
from dge_models.canvas import StageTokens, at_own_sizes
from dge_models.encoder import DGEBlock
from dge_models.pyramid_stage import NewBlock, PyramidStage, spatial_map
from dge_models.routed import noise_per_block, routed_blocks
from dge_models.router import Router
from dge_models.routing import Routing
from dge_models.single_grid import image_size, intermediates_of

__all__ = ["Pyramid", "check_stages", "pyramid_input"]

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


class Pyramid(padding.FollowsPadding):
    """Stages of decreasing resolution and a head.

    A subclass says with which blocks. Parameters have the names of timm's pyramids (``stages.0.blocks.0`` ...), and
    there are the methods that timm's models have. Images may have any size from one token in the last stage on:
    position embeddings are interpolated at call time.

    Args:
        img_size: Pixels that the position embeddings are made for.
        new_blocks: What makes a stage's blocks, per stage.
        new_norm: Makes the norm in front of the head.
        in_chans: Channels of the images.
        num_classes: Of the head; 0 leaves the pooled features.
        global_pool: What the head sees: "token" (the class token), "avg", "avgmax", "max" of the last
            stage's spatial tokens, or "" for all tokens.
        patch_sizes: Input pixels per side of a token, per stage.
        embed_dims: Widths, per stage.
        depths: Blocks, per stage.
        smallest_grids: Tokens per side that a stage needs at least, per stage.
        class_token: Put a class token in front of the last stage's tokens.
        dynamic_img_size: Take any image size; otherwise `img_size` alone.
        drop_rate: Dropout in front of the head.
        pos_drop_rate: Dropout after the position embeddings.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: `global_pool` is unknown or needs a class token that is not there, or `img_size` is too small.
    """

    if TYPE_CHECKING:  # TorchScript would take them at their word
        stages: Any
        norm: nn.Module
        head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int],
        new_blocks: Sequence[NewBlock],
        new_norm: Any,
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        patch_sizes: Sequence[int],
        embed_dims: Sequence[int],
        depths: Sequence[int],
        smallest_grids: Sequence[int],
        class_token: bool,
        dynamic_img_size: bool,
        drop_rate: float,
        pos_drop_rate: float,
        drop_path_rate: float,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = int(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.global_pool = self._check_pool(global_pool)
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        strides = list(accumulate(patch_sizes, mul))
        needed = [stride * side for stride, side in zip(strides, smallest_grids, strict=True)]
        self.smallest_size, self.whole_cells = max(needed), lcm(*needed)
        if min(self.img_size) < self.smallest_size:
            raise ValueError(f"img_size: got {self.img_size}; expected at least {self.smallest_size} pixels per side")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList()
        self.feature_info = []
        for index, stride in enumerate(strides):
            stage = PyramidStage(
                (self.img_size[0] // stride, self.img_size[1] // stride),
                embed_dims[index - 1] if index else in_chans,
                embed_dims[index],
                depths[index],
                new_blocks[index],
                patch_size=patch_sizes[index],
                class_token=class_token and index == len(depths) - 1,
                drop_path=rates[index],
                pos_drop=pos_drop_rate,
                device=device,
                dtype=dtype,
            )
            self.stages.append(stage)
            self.feature_info.append({"num_chs": embed_dims[index], "reduction": stride, "module": f"stages.{index}"})
        self.norm = new_norm(self.embed_dim, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(device, dtype)
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise all weights and computed buffers again, routers included; also in uninitialised memory.

        Args:
            mode: Accepted as timm's models accept it; there is one initialisation.
            needs_reset: Include what initialises itself when it is made: convolutions, which keep PyTorch's
                initialisation, and norms.
        """
        self.apply(_init_weights)
        for block in routed_blocks(self):
            block.router.reset_parameters()
        # Last, so that a seed still gives linear layers the weights that it gave them without these.
        for module in self.modules() if needs_reset else ():
            if hasattr(module, "reset_parameters") and not isinstance(module, nn.Linear | PyramidStage | Router):
                cast(Any, module).reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: [B, C, H, W] images.

        Returns:
            [B, classes]; without a head the pooled features, without pooling all tokens.

        Raises:
            ValueError: The images are not [B, C, H, W], too small, or of another size than a model without
                `dynamic_img_size` takes.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.forward_head(self.forward_features(x))
        else:
            return at_own_sizes(self, self._logits, x) if padding.in_use else self._logits(x)

    @torch.jit.unused
    def _logits(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens of the last stage after the final norm, [B, T + H·W, C]; class token first."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.norm(self._run_plain_stages(x))
        else:
            return at_own_sizes(self, self._features, x) if padding.in_use else self._features(x)

    @torch.jit.unused
    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self._run_stages(images)[0])
        return features

    @torch.jit.unused
    def size_multiple(self) -> tuple[int, int]:
        """The least common multiple of what the stages read at once."""
        return self.whole_cells, self.whole_cells

    @torch.jit.unused
    def last_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the last stage that there is."""
        stride = self.feature_info[len(self.stages) - 1]["reduction"]
        return size[0] // stride, size[1] // stride

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and classify.

        Args:
            x: What :meth:`forward_features` returns.
            pre_logits: Return what the classifier would see.
        """
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

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
        run = partial(self._stage_outputs, take=take, norm=norm, stages=last + 1 if stop_early else None)
        features, kept = at_own_sizes(self, run, x) if padding.in_use else run(x)
        prefixes = [each.tokens[:, : each.prefix] for each in kept]
        maps = [_formatted(each.tokens, each.grid, each.prefix, output_fmt) for each in kept]
        pairs = (maps, prefixes if return_prefix_tokens else None)
        return intermediates_of(*pairs, lambda: features.tokens, intermediates_only, output_dict)

    def _stage_outputs(
        self, images: Tensor, take: Sequence[int], norm: bool, stages: int | None
    ) -> tuple[StageTokens, list[StageTokens]]:
        """The tokens of the last stage that ran, after the final norm if it is the last one, and of chosen stages."""
        tokens, _, outputs = self._run_stages(images, stages=stages)
        places = [
            StageTokens(*output, stage.num_prefix_tokens) for output, stage in zip(outputs, self.stages, strict=False)
        ]
        final = len(self.stages) - 1
        kept = [
            places[index]._replace(tokens=self.norm(places[index].tokens)) if norm and index == final else places[index]
            for index in take
        ]
        features = self.norm(tokens) if len(outputs) == len(self.stages) else tokens
        return places[-1]._replace(tokens=features), kept

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

    def _run_plain_stages(self, x: Tensor) -> Tensor:
        """The last stage's tokens, in the part of Python that TorchScript knows."""
        _, _, height, width = x.shape
        if not self.dynamic_img_size and (height != self.img_size[0] or width != self.img_size[1]):
            raise ValueError("images: got another size than img_size; expected that one (dynamic_img_size is off)")
        if height < self.smallest_size or width < self.smallest_size:
            raise ValueError("images: got fewer pixels per side than smallest_size; expected at least so many")
        tokens = x
        for stage in self.stages:
            tokens, x = stage.run_plain(x)
        return tokens

    @torch.jit.unused
    def _run_stages(
        self,
        images: Tensor,
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
        stages: int | None = None,
    ) -> tuple[Tensor, list[Routing], list[tuple[Tensor, tuple[int, int]]]]:
        """The last stage's tokens, the routings, and every stage's tokens with their grid.

        Whoever listens, see :func:`dge_models.collect_routings`, is told the routings at the end.
        """
        x = pyramid_input(images, self.img_size, self.smallest_size, self.dynamic_img_size)
        routed = sum(isinstance(block, DGEBlock) for stage in self.stages for block in stage.blocks)
        pending = noise_per_block(noise, routed)
        routings: list[Routing] = []
        outputs: list[tuple[Tensor, tuple[int, int]]] = []
        tokens = x
        for index, stage in enumerate(list(self.stages)[:stages]):
            if index:
                x = spatial_map(tokens, outputs[-1][1], self.stages[index - 1].num_prefix_tokens)
            tokens, grid, of_stage = stage(x, noise=pending, return_routing=return_routing or listening.in_use)
            outputs.append((tokens, grid))
            routings.extend(of_stage)
        if listening.in_use:
            run = [block for stage in list(self.stages)[:stages] for block in stage.blocks]
            listening.tell([block for block in run if isinstance(block, DGEBlock)], routings)
        return tokens, routings, outputs


def check_stages(**lists: Sequence[float]) -> None:
    """A ValueError if these arguments, by name, don't have one entry per stage each."""
    lengths = [len(values) for values in lists.values()]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"{', '.join(lists)}: got {lengths} entries; expected one per stage in each")


def _listed(indices: Sequence[int] | None) -> list[int] | None:
    return None if indices is None else list(indices)


def _formatted(tokens: Tensor, grid: tuple[int, int], prefix: int, output_fmt: str) -> Tensor:
    if output_fmt == "NLC":
        return tokens[:, prefix:]
    spatial = spatial_map(tokens, grid, prefix)
    return spatial.contiguous() if output_fmt == "NCHW" else spatial.permute(0, 2, 3, 1).contiguous()


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation, of what does not keep PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PyramidStage):
        module.reset_parameters()
