"""What all models with routed blocks have in common, and what those on one token grid have."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.fx
from timm.models import checkpoint
from torch import Tensor, nn

from dge_models import listening, padding
from dge_models.canvas import at_own_sizes
from dge_models.encoder import DGEBlock, DropPathMode, TrainingMode
from dge_models.recorded_arguments import RecordedArguments
from dge_models.routing import Routing
from dge_models.single_grid import SingleGridTransformer, refuse_masks

__all__ = [
    "RoutedModel",
    "RoutedTransformer",
    "noise_per_block",
    "route_blocks",
    "routed_blocks",
    "run_routed",
]


class RoutedModel(RecordedArguments):
    """A model whose ``forward(images, *, noise=None, return_routing=False)`` routes its blocks."""

    def forward_routed(self, images: Tensor, *, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Routing]]:
        """Classify images and return how each layer was routed.

        Args:
            images: [B, C, H, W].
            noise: Gumbel noise for one training step, one tensor per routed block in network order, each
                float32 [B, ⌈H/S⌉, ⌈W/S⌉, n] for the block's own grid; None draws it.

        Returns:
            The logits (for a distilled model in distilled training, timm's pair of them), and one
            :class:`Routing` per routed block in network order.
        """
        out: tuple[Tensor, list[Routing]] = self(images, noise=noise, return_routing=True)
        return out


def routed_blocks(model: nn.Module) -> list[DGEBlock]:
    """The routed blocks of a model, in network order."""
    return [module for module in model.modules() if isinstance(module, DGEBlock)]


def noise_per_block(noise: Sequence[Tensor] | None, routed: int) -> Iterator[Tensor | None]:
    """The noise of one routed block after the other.

    Args:
        noise: One tensor per routed block, or None.
        routed: How many routed blocks there are.

    Raises:
        ValueError: There are more or fewer tensors than routed blocks.
    """
    if noise is None:
        return iter([None] * routed)
    if len(noise) != routed:
        raise ValueError(f"noise: got {len(noise)} tensors; expected one per routed block, {routed}")
    return iter(noise)


def run_routed(
    block: DGEBlock,
    x: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    *,
    noise: Tensor | None,
    return_routing: bool,
    checkpointing: bool,
    positions: Any = None,
) -> Any:
    """What a routed block returns, called within gradient checkpointing if wanted; see there for the arguments."""
    if block.training or block.fixed_layout is None:
        refuse_tracing()
    return _call_block(block, x, grid, num_prefix_tokens, noise, return_routing, checkpointing, positions)


def refuse_tracing() -> None:
    """A RuntimeError inside ``torch.jit.trace``, which would take one image's number of queries for all images'."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace: got a model with dynamic queries, whose number it would record as a constant; expected "
            "fixed ones in evaluation, use set_fixed_queries (or torch.export)"
        )


def _call_block(
    block: DGEBlock,
    x: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    noise: Tensor | None,
    return_routing: bool,
    checkpointing: bool,
    positions: Any,
) -> Any:
    if not checkpointing:
        return block(x, grid, num_prefix_tokens, positions=positions, noise=noise, return_routing=return_routing)
    # Drawn out here, so that the recomputation in the backward pass routes as the forward pass did.
    if noise is None and block.training:
        noise = block.router.draw_noise(x.shape[0], grid, x.device)
    # The re-entrant kind would cut the routing off from the graph.
    return checkpoint(
        block,
        x,
        grid,
        num_prefix_tokens,
        positions=positions,
        noise=noise,
        return_routing=return_routing,
        use_reentrant=False,
    )


def route_blocks(
    model: Any,
    *,
    splits: tuple[int, ...],
    layers: Iterable[int] | None,
    training_mode: TrainingMode,
    drop_path_mode: DropPathMode,
) -> None:
    """Turn blocks of a transformer on one token grid into routed ones, in place.

    Args:
        model: Whose ``blocks`` to change.
        splits: Queries per region side, finest first.
        layers: Indices of the blocks that route, negative ones from the end; None means all.
        training_mode: "dense" or "sparse".
        drop_path_mode: "query" or "image".

    Raises:
        ValueError: An index is out of range or occurs twice, tokens are dropped between the patch embedding
            and the blocks, the image is smaller than a patch, or a block can't be routed.
    """
    depth = len(model.blocks)
    wanted = list(range(depth)) if layers is None else [int(layer) for layer in layers]
    if any(not -depth <= layer < depth for layer in wanted):
        raise ValueError(f"layers: got {wanted}; expected indices of the model's {depth} blocks")
    wanted = [layer % depth for layer in wanted]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"layers: got {wanted}; expected each block at most once")
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise ValueError("patch_drop_rate: got patch dropout; expected 0, regions need the whole token grid")
    grid = model.patch_embed.grid_size
    if grid is not None and min(grid) < 1:
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        raise ValueError(f"img_size: got {size}; expected at least one patch of {patch}")
    for layer in sorted(wanted):
        model.blocks[layer] = DGEBlock.adopt(
            model.blocks[layer],
            f"blocks.{layer}",
            splits=splits,
            training_mode=training_mode,
            drop_path_mode=drop_path_mode,
        )


class RoutedTransformer(RoutedModel, SingleGridTransformer):
    """What a model with routed blocks adds to one of timm's transformers on one token grid.

    A loop over the blocks that hands them the grid and gives their routings back. It stands in front of timm's class
    among the bases and takes that class's attributes: ``patch_embed``, ``blocks``, ``norm``, and so on. A family whose
    embedding or whose blocks differ overrides :meth:`_place`, :meth:`_positions` or :meth:`_run_plain`.

    Args:
        *args: What timm's class takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        layers: Indices of the blocks that route; None means all. The others stay timm's.
        training_mode: "dense" or "sparse", see :class:`DGEBlock`.
        drop_path_mode: "query" or "image", see :class:`DGEBlock`.
        **kwargs: What timm's class takes.

    Raises:
        ValueError: As in :func:`route_blocks`.
    """

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        layers: Iterable[int] | None = None,
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        route_blocks(self, splits=splits, layers=layers, training_mode=training_mode, drop_path_mode=drop_path_mode)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Classify images.

        Args:
            x: [B, C, H, W] images.
            attn_mask: Not supported: a pooled query stands for several tokens.
            is_causal: Not supported, for the same reason.
            noise: As in :meth:`forward_routed`.
            return_routing: Return (logits, routings) instead of the logits. Through this argument the
                routings also come out of wrappers that know ``forward`` alone, such as DDP.

        Returns:
            What timm's model returns; with `return_routing` and one :class:`Routing` per routed block.

        Raises:
            ValueError: The images are not [B, C, H, W] or smaller than a patch, `noise` doesn't fit, or a
                mask is given.
        """
        # torch.fx passes a proxy for every argument; what has a default keeps it in the traced graph.
        if not isinstance(x, torch.fx.Proxy):
            refuse_masks(attn_mask, is_causal)
        else:
            noise, return_routing = None, False
        run = partial(self._classify, return_routing=return_routing)
        return at_own_sizes(self, run, x, noise) if padding.in_use else run(x, noise)

    def _classify(self, images: Tensor, noise: Sequence[Tensor] | None = None, *, return_routing: bool) -> Any:
        x, grid, positions = self._embed(images)
        x, routings, _ = self._run_blocks(x, grid, positions, noise=noise, return_routing=return_routing)
        x = self.forward_head(self.norm(x))
        return (x, routings) if return_routing else x

    def _run_plain(self, block: nn.Module, x: Tensor, positions: Any) -> Tensor:
        """A block that does not route, on tokens [B, T + H·W, C]."""
        tokens: Tensor = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return tokens

    def _run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int],
        positions: Sequence[Any],
        *,
        noise: Sequence[Tensor] | None = None,
        return_routing: bool = False,
        keep: Container[int] = (),
        depth: int | None = None,
    ) -> tuple[Tensor, list[Routing], list[Tensor]]:
        """Tokens after the first `depth` blocks, the routings, and the tokens after the blocks in `keep`.

        Whoever listens, see :func:`dge_models.collect_routings`, is told the routings at the end.
        """
        wanted = return_routing or listening.in_use
        pending = noise_per_block(noise, sum(isinstance(block, DGEBlock) for block in self.blocks))
        routings: list[Routing] = []
        kept: list[Tensor] = []
        blocks: Sequence[nn.Module] = list(self.blocks)
        for index, block in enumerate(blocks[:depth]):
            if isinstance(block, DGEBlock):
                x = run_routed(
                    block,
                    x,
                    grid,
                    self.num_prefix_tokens,
                    noise=next(pending),
                    return_routing=wanted,
                    checkpointing=self.grad_checkpointing,
                    positions=positions[index],
                )
                if wanted:
                    x, routing = x
                    routings.append(routing)
            else:
                x = self._run_plain(block, x, positions[index])
            if index in keep:
                kept.append(x)
        if listening.in_use:
            listening.tell([block for block in blocks[:depth] if isinstance(block, DGEBlock)], routings)
        return x, routings, kept
