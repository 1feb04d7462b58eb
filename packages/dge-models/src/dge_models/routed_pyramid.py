"""What pyramids with routed blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.fx
from torch import Tensor

from dge_models import padding
from dge_models.canvas import at_own_sizes
from dge_models.encoder import DGEBlock, DropPathMode, TrainingMode
from dge_models.pyramid import Pyramid
from dge_models.routed import RoutedModel

__all__ = ["RoutedPyramid"]


class RoutedPyramid(Pyramid, RoutedModel):
    """A pyramid all of whose blocks route their queries; it stands in front of the plain one among the bases.

    The queries of a stage are pooled from its tokens. The grids of the stages differ, and with them the shapes of
    noise and routings.

    Source: Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021.

    Args:
        *args: What the plain pyramid takes.
        splits: Queries per region side, finest first; the first is the region's side in tokens.
        training_mode: "dense" or "sparse", see :class:`DGEBlock`.
        drop_path_mode: "query" or "image", see :class:`DGEBlock`.
        **kwargs: What the plain pyramid takes.

    Raises:
        ValueError: As in the plain pyramid and in :class:`DGEBlock`.
    """

    def __init__(
        self,
        *args: Any,
        splits: tuple[int, ...] = (4, 2, 1),
        training_mode: TrainingMode = "dense",
        drop_path_mode: DropPathMode = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, stage in self.stages.named_children():
            for index, block in enumerate(stage.blocks):
                stage.blocks[index] = DGEBlock.adopt(
                    block,
                    f"stages.{name}.blocks.{index}",
                    splits=splits,
                    training_mode=training_mode,
                    drop_path_mode=drop_path_mode,
                )

    def forward(self, x: Tensor, *, noise: Sequence[Tensor] | None = None, return_routing: bool = False) -> Any:
        """Classify images.

        Args:
            x: [B, C, H, W] images.
            noise: As in :meth:`forward_routed`.
            return_routing: Return (logits, routings) instead of the logits. Through this argument the
                routings also come out of wrappers that know ``forward`` alone, such as DDP.

        Returns:
            What the plain model returns; with `return_routing` and one :class:`Routing` per block.

        Raises:
            ValueError: As in the plain model, or `noise` doesn't fit.
        """
        # torch.fx passes a proxy for every argument; what has a default keeps it in the traced graph.
        if isinstance(x, torch.fx.Proxy):
            noise, return_routing = None, False
        run = partial(self._classify, return_routing=return_routing)
        return at_own_sizes(self, run, x, noise) if padding.in_use else run(x, noise)

    def _classify(self, images: Tensor, noise: Sequence[Tensor] | None = None, *, return_routing: bool) -> Any:
        tokens, routings, _ = self._run_stages(images, noise=noise, return_routing=return_routing)
        logits = self.forward_head(self.norm(tokens))
        return (logits, routings) if return_routing else logits
