"""timm's ``Eva`` with routed blocks: DINOv3, EVA-02, Perception Encoder and other ViTs with rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import checkpoint, register_notrace_module
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from dge_models.attention import Kernel, KnownAttention, attention_output
from dge_models.encoder import DGEBlock, Heads, Patches
from dge_models.every_split import patch_index, pool_every_split
from dge_models.families import Family, has_blocks, register_family
from dge_models.macs import LayerMacs, ModelMacs, mlp_macs, router_macs, single_grid_macs
from dge_models.projections import project
from dge_models.routed import RoutedTransformer, routed_blocks
from dge_models.unconvertible import reason_against_parts

__all__ = ["DGEEva", "DGEEvaBlock"]


@dataclass(frozen=True)
class Rotations:
    """Where the tokens of a block are, as rotations of their queries and keys.

    Attributes:
        rope: What timm's block takes: [H·W, 2d], or [h, H·W, 2d] with rotations of each head's own.
        table: [T + Σ ⌈H/p⌉·⌈W/p⌉, 1 or h, 2d], sines and then cosines, in the order of
            :func:`~dge_models.every_split.every_patch`. Prefix tokens are not turned.
        num_tokens: T + H·W; that many rows come first and belong to the tokens themselves.
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.
    """

    rope: Tensor
    table: Tensor
    num_tokens: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    splits: tuple[int, ...]

    def of_tokens(self) -> Tensor:
        """[T + H·W, 1 or h, 2d]."""
        return self.table[: self.num_tokens]

    def of_patches(self, patches: Tensor) -> Tensor:
        """[..., 1 or h, 2d] for patches [..., 3]."""
        return self.table[patch_index(patches, self.grid, self.num_prefix_tokens, self.splits)]


def rotations(
    rope: Tensor, of_tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int, splits: tuple[int, ...]
) -> Rotations:
    """The rotations of every query that may be computed.

    A pooled query gets the mean of its tokens' rotations. So its logits are the mean of those that its content would
    have at each of its tokens, whatever the kind of embedding; where the tokens' phases are far apart, as in the high
    frequencies, the mean is near zero, and the query does not claim to know its place more precisely than its patch.
    Tried against the phase of the patch's centre on three small models (two like DINOv3, one like EVA-02) trained on
    digits and converted, all regions at one coarse split: the tokens' cosine to the plain model's was larger with the
    mean in all six comparisons, such as 0.858 against 0.854 at one query per 2 × 2 tokens and 0.588 against 0.535 at
    one per 4 × 4.

    Args:
        rope: As in :class:`Rotations`.
        of_tokens: The same as [H·W, 1 or h, 2d].
        grid: (H, W).
        num_prefix_tokens: T.
        splits: Queries per region side, finest first.
    """
    sine, _ = of_tokens[:1].expand(num_prefix_tokens, -1, -1).chunk(2, -1)
    unturned = torch.cat([torch.zeros_like(sine), torch.ones_like(sine)], -1)
    of_tokens = torch.cat([unturned, of_tokens])
    pooled = pool_every_split(of_tokens.flatten(1).unsqueeze(0), grid, num_prefix_tokens, splits)
    table = torch.unflatten(pooled.squeeze(0), -1, of_tokens.shape[1:])
    return Rotations(rope, table, num_prefix_tokens + grid[0] * grid[1], grid, num_prefix_tokens, splits)


_PARTS = frozenset(
    {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
)


@register_notrace_module
class DGEEvaBlock(DGEBlock, EvaBlock):  # type: ignore[misc]  # timm types its kinds of blocks differently
    """timm's ``EvaBlock`` with as many queries as each region needs; its positions are :class:`Rotations` or None.

    See :class:`DGEBlock`. Keys keep the rotations of their tokens, pooled queries get those of their patches.
    """

    plain = EvaBlock
    parts: ClassVar = DGEBlock.parts - {"ls1", "ls2"}
    attention: ClassVar = KnownAttention((EvaAttention, AttentionRope), _PARTS)
    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def make_keys(self, normed: Tensor, grid: tuple[int, int], positions: Any) -> Heads:
        """Keys, turned to their places, and values; see :meth:`DGEBlock.make_keys`."""
        attn = cast(Any, self.attn)
        if attn.qkv is None:
            k, v = (torch.unflatten(layer(normed), -1, (-1, attn.head_dim)) for layer in (attn.k_proj, attn.v_proj))
        else:
            inner = attn.num_heads * attn.head_dim
            both = project(attn.qkv, normed, slice(inner, None))
            if getattr(attn, "q_bias", None) is not None:
                both = both + torch.cat([attn.k_bias, attn.v_bias]).to(both.dtype)
            k, v = torch.unflatten(both, -1, (2, attn.num_heads, attn.head_dim)).unbind(-3)
        k = attn.k_norm(k)
        if positions is not None:
            k = _turn(k, positions.of_tokens(), attn)
        k, groups = k.to(v.dtype), getattr(attn, "num_kv_groups", 1)
        if groups > 1:
            k, v = (heads.repeat_interleave(groups, dim=-2) for heads in (k, v))
        return k, v

    def attend(self, normed: Tensor, keys: Heads, kernel: Kernel, positions: Any, patches: Patches) -> Tensor:
        """What attention adds to the queries, which are turned to their places; see :meth:`DGEBlock.attend`."""
        attn = cast(Any, self.attn)
        if attn.qkv is None:
            q = attn.q_proj(normed)
        else:
            q = project(attn.qkv, normed, slice(None, attn.num_heads * attn.head_dim))
            if getattr(attn, "q_bias", None) is not None:
                q = q + attn.q_bias.to(q.dtype)
        q = attn.q_norm(torch.unflatten(q, -1, (attn.num_heads, attn.head_dim)))
        if positions is not None:
            q = _turn(q, positions.of_patches(patches()), attn)
        return attention_output(attn, kernel(q.to(keys[1].dtype), *keys), normed)

    def scale_attention(self, update: Tensor) -> Tensor:
        """``gamma_1``, where there is one."""
        return update if self.gamma_1 is None else self.gamma_1 * update

    def scale_mlp(self, update: Tensor) -> Tensor:
        """``gamma_2``, where there is one."""
        return update if self.gamma_2 is None else self.gamma_2 * update


def _turn(heads: Tensor, table: Tensor, attn: Any) -> Tensor:
    turned: Tensor = apply_rot_embed_cat(heads, table, half=getattr(attn, "rotate_half", False))
    return turned


class DGEEva(RoutedTransformer, Eva):  # type: ignore[misc]  # as for its other models, more is returned on request
    """timm's ``Eva`` whose blocks route their queries.

    Everything else, parameter names included, is timm's. See :class:`~dge_models.routed.RoutedTransformer` for the
    arguments that are not timm's.
    """

    rope: Any
    rope_mixed: bool

    def _place(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Sequence[Any]]:
        x, rope = self._pos_embed(patches)
        routed, depth = routed_blocks(self), len(self.blocks)
        if rope is None or not routed:
            return x, [rope] * depth
        where = (grid, self.num_prefix_tokens, routed[0].router.splits)
        if not self.rope_mixed:
            return x, [rotations(rope, rope.unsqueeze(-2), *where)] * depth
        return x, [rotations(rope[block], rope[block].transpose(0, 1), *where) for block in range(depth)]

    def _run_plain(self, block: nn.Module, x: Tensor, positions: Any) -> Tensor:
        run = partial(checkpoint, block) if self.grad_checkpointing else block
        tokens: Tensor = run(x, rope=positions.rope if isinstance(positions, Rotations) else positions)
        return tokens


def _layer_macs(block: Any, num_tokens: int, grid: tuple[int, int]) -> LayerMacs:
    """Norms C per row, projections, both attention products, softmax 3 per score, MLP with activation."""
    attn: Any = block.attn
    width, inner = attn.proj.out_features, attn.num_heads * attn.head_dim
    keys = getattr(attn, "num_kv_heads", attn.num_heads) * attn.head_dim
    gate = inner * width if getattr(attn, "gate", None) is not None else 0  # in newer releases of timm
    fixed = num_tokens * (width + 2 * width * keys)
    attention = num_tokens * (2 * inner + 3 * attn.num_heads)
    per_query = width + 2 * width * inner + gate + attention + mlp_macs(block.mlp)
    return LayerMacs(fixed + router_macs(block, width, grid), per_query, num_tokens)


class RotaryTransformers(Family):
    """timm's ``Eva``, and that with routed blocks. The rotations themselves are not counted among the MACs."""

    models = (Eva,)
    converts: ClassVar = {Eva: DGEEva}
    weights = "a vision transformer of timm's class Eva"

    def model_macs(self, model: Any, grid: tuple[int, int]) -> ModelMacs:
        """Blocks with all tokens as keys and values, the patch embedding, pooling and the head."""
        return single_grid_macs(model, grid, _layer_macs)

    def owns_keys(self, keys: Iterable[str]) -> bool:
        """Blocks with numbers, without stages, as of other vision transformers."""
        return has_blocks(keys)

    def reason_against(self, model: nn.Module) -> str | None:
        """Hybrids, and blocks whose norms follow."""
        return reason_against_parts(model) if type(model) in self.converts else None


register_family(RotaryTransformers())
