"""timm's vision transformers whose blocks merge similar tokens, without any training."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint, register_notrace_module
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dge_kernels import ragged_attention
from dge_models import padding
from dge_models.attention import attention_output, input_width
from dge_models.canvas import at_own_sizes
from dge_models.macs import MacCount, mlp_macs, model_macs
from dge_models.merging import Groups, Match, Step, match, merge, restore, select_above, select_most, single_tokens
from dge_models.recorded_arguments import RecordedArguments
from dge_models.single_grid import SingleGridTransformer, image_size, refuse_masks

__all__ = [
    "MergedTransformer",
    "MergedVisionTransformer",
    "MergedVisionTransformerDistilled",
    "Merging",
    "MergingBlock",
]


@dataclass(frozen=True)
class Merging:
    """What one block did.

    Attributes:
        attended: int64 [B], groups of each image that attention saw.
        left: int64 [B], groups of each image that its MLP saw.
        step: What merged; None if nothing could.
    """

    attended: Tensor
    left: Tensor
    step: Step | None


@register_notrace_module
class MergingBlock(Block):
    """timm's pre-norm block on packed groups of tokens; between attention and MLP similar groups are merged.

    Attributes:
        threshold: Groups merge whose keys are more similar than this, a cosine; None: none do, or `count` says.
        limit: Beside `threshold`, so many groups of an image merge at most.
        count: So many groups of every image merge, the most similar ones; None: `threshold` says.
    """

    threshold: float | None
    limit: int | None
    count: int | None

    def forward(  # type: ignore[override]  # a block that merges has to know the groups
        self, x: Tensor, groups: Groups
    ) -> tuple[Tensor, Groups, Merging]:
        """Run the block.

        Args:
            x: [G, C] tokens, one per group.
            groups: G of them.

        Returns:
            [G', C] tokens, the G' groups, and what happened.
        """
        x, found = self.attend_groups(x, groups)
        return self.merge_groups(x, groups, found, None if found is None else self._selection(groups, found))

    def attend_groups(self, x: Tensor, groups: Groups) -> tuple[Tensor, Match | None]:
        """Tokens after attention, and the partners that its keys find."""
        attn = cast(Any, self.attn)
        normed = self.norm1(x)
        q, k, v = torch.unflatten(attn.qkv(normed), -1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
        update = attention_output(attn, _attention(q, k, v, groups, attn.scale), normed)
        x = x + self._drop(self.drop_path1, self.ls1(update), groups)
        return x, match(k.detach(), groups, self.limit)

    def merge_groups(
        self, x: Tensor, groups: Groups, found: Match | None, selected: Tensor | None
    ) -> tuple[Tensor, Groups, Merging]:
        """What follows :meth:`attend_groups`; `selected` says which groups merge, None that none do."""
        attended, step = groups.lengths, None
        if selected is not None and found is not None:
            step, groups = merge(x, groups, found, selected, self.count)
            x = step.after
        x = x + self._drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), groups)
        return x, groups, Merging(attended, groups.lengths, step)

    def _selection(self, groups: Groups, found: Match) -> Tensor | None:
        if self.count is not None:
            return select_most(found, groups, self.count) if self.count else None
        return None if self.threshold is None else select_above(found, self.threshold)

    def _drop(self, drop_path: nn.Module, update: Tensor, groups: Groups) -> Tensor:
        """Stochastic depth drops an image's updates together."""
        if not self.training or isinstance(drop_path, nn.Identity):
            return update
        kept: Tensor = drop_path(update.new_ones(groups.batch, 1))
        return update * kept[groups.image]


def _attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """Attention within each image over [G, h, d]; a group counts as often as it has tokens."""
    bias = groups.sizes.log() if groups.merged else None
    if not groups.even:
        ends, longest = groups.cu_seqlens, groups.longest
        return ragged_attention(
            *(q, k, v),
            scale=scale,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            bias=bias,
        )
    q, k, v = (torch.unflatten(part, 0, (groups.batch, groups.longest)).transpose(1, 2) for part in (q, k, v))
    mask = None if bias is None else bias.view(groups.batch, 1, 1, groups.longest).to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(0, 1)


class MergedTransformer(SingleGridTransformer, RecordedArguments):
    """What merging adds to one of timm's vision transformers: a loop over the blocks with groups, and the whole grid.

    Made by :func:`merge_tokens`. Weights and their names are those of the plain model.
    """

    global_pool: Any
    attn_pool: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Classify images.

        Args:
            x: [B, C, H, W] images.
            attn_mask: Not supported: a merged token stands for several.
            is_causal: Not supported, for the same reason.

        Returns:
            What timm's model returns.

        Raises:
            ValueError: The images are not [B, C, H, W] or smaller than a patch, or a mask is given.
        """
        refuse_masks(attn_mask, is_causal)
        return at_own_sizes(self, self._classify, x) if padding.in_use else self._classify(x)

    def _classify(self, images: Tensor) -> Any:
        return self.forward_merged(images)[0]

    def forward_merged(self, images: Tensor) -> tuple[Any, list[Merging]]:
        """Classify images and return what each block merged.

        Args:
            images: [B, C, H, W].
        """
        x, grid, positions = self._embed(images)
        # Prefix tokens are whole already, and a head that reads no others needs no way back.
        whole = self.attn_pool is not None or self.global_pool != "token"
        x, mergings, _ = self._run_blocks(x, grid, positions, whole=whole)
        return self.forward_head(self.norm(x)), mergings

    def _run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int],
        positions: Sequence[Any],
        *,
        keep: Container[int] = (),
        depth: int | None = None,
        whole: bool = True,
    ) -> tuple[Tensor, list[Merging], list[Tensor]]:
        """See :class:`SingleGridTransformer`; without `whole` the tokens are the prefix tokens alone."""
        batch, tokens = x.shape[:2]
        groups = single_tokens(x, self.num_prefix_tokens, even=self.even)
        packed = x.flatten(0, 1)
        mergings: list[Merging] = []
        kept: list[Tensor] = []

        def grown(packed: Tensor) -> Tensor:
            steps = [merging.step for merging in mergings if merging.step is not None]
            return torch.unflatten(restore(packed, steps), 0, (batch, tokens))

        for index, block in enumerate(list(self.blocks)[:depth]):
            run = partial(checkpoint, block, use_reentrant=False) if self.grad_checkpointing else block
            packed, groups, merging = run(packed, groups)
            mergings.append(merging)
            if index in keep:
                kept.append(grown(packed))
        if whole:
            return grown(packed), mergings, kept
        first = groups.starts.unsqueeze(1) + torch.arange(self.num_prefix_tokens, device=x.device)
        return packed[first], mergings, kept

    @property
    def even(self) -> bool:
        """Whether every image loses equally many tokens, so that shapes are static."""
        return all(block.threshold is None for block in self.blocks)

    def merging_arguments(self) -> dict[str, Any]:
        """What merges, as arguments of :func:`dge_vit`; values that JSON can hold."""
        if self.even:
            return {"merge_counts": [block.count or 0 for block in self.blocks]}
        return {
            "merge_thresholds": [block.threshold for block in self.blocks],
            "merge_limits": [block.limit for block in self.blocks],
        }

    def count_macs(self, images: Tensor) -> MacCount:
        """See :func:`dge_models.count_macs`, which calls this."""
        grid = self.patch_embed.dynamic_feat_size(image_size(images))
        return self.macs_of(self.forward_merged(images)[1], grid)

    def macs_of(self, mergings: Sequence[Merging], grid: tuple[int, int]) -> MacCount:
        """The MACs of a forward pass that was already made.

        Attention and its projections count the groups that it saw, as queries and as keys; the MLP those that were
        left; merging the similarities that it computed.

        Args:
            mergings: One per block.
            grid: (H, W) of the token grid.
        """
        rows = [
            _block_macs(block, merging.attended.double().cpu(), merging.left.double().cpu(), self.num_prefix_tokens)
            for block, merging in zip(self.blocks, mergings, strict=True)
        ]
        return model_macs(self, grid).count(torch.stack(rows))


def _block_macs(block: Any, attended: Tensor, left: Tensor, num_prefix_tokens: int) -> Tensor:
    """float64 [B], of one block; see :func:`dge_models.macs.model_macs` for what is counted."""
    attn = block.attn
    width, inner = input_width(attn), attn.num_heads * attn.head_dim
    gate = inner * width if getattr(attn, "gate", None) is not None else 0
    projections = attended * (width + 4 * width * inner + gate)
    attention = attended * attended * (2 * inner + 3 * attn.num_heads)
    matched = ((attended - num_prefix_tokens) / 2).square() * attn.head_dim
    merges = block.threshold is not None or bool(block.count)
    return projections + attention + (matched if merges else 0) + left * (width + mlp_macs(block.mlp))


class MergedVisionTransformer(MergedTransformer, VisionTransformer):
    """timm's ``VisionTransformer`` whose blocks merge similar tokens."""


class MergedVisionTransformerDistilled(MergedTransformer, VisionTransformerDistilled):
    """timm's ``VisionTransformerDistilled`` (two prefix tokens, two heads) whose blocks merge similar tokens."""
