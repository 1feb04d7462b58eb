"""What all models with routed blocks have in common: one call that also returns the routings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from timm.models import checkpoint
from torch import Tensor, nn

from dge_models.encoder import DGEBlock
from dge_models.routing import Routing

__all__ = ["RoutedModel", "noise_per_block", "routed_blocks", "run_routed"]


class RoutedModel(nn.Module):
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
        return repeat(None, routed)
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
) -> Any:
    """Call a routed block, within gradient checkpointing if wanted.

    Args:
        block: What to call.
        x: [B, T + H·W, C] tokens.
        grid: (H, W).
        num_prefix_tokens: T.
        noise: The block's Gumbel noise, or None.
        return_routing: As in the block.
        checkpointing: Recompute the block in the backward pass.

    Returns:
        What the block returns.
    """
    if not checkpointing:
        return block(x, grid, num_prefix_tokens, noise=noise, return_routing=return_routing)
    # Drawn out here, so that the recomputation in the backward pass routes as the forward pass did.
    if noise is None and block.training:
        noise = block.router.draw_noise(x.shape[0], grid, x.device)
    # The re-entrant kind would cut the routing off from the graph.
    return checkpoint(
        block, x, grid, num_prefix_tokens, noise=noise, return_routing=return_routing, use_reentrant=False
    )
