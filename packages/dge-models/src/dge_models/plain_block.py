"""A routed block whose parts nobody has changed, run without calling each of them: the operations are those of
``DGEBlock`` on the same tensors in the same order, and so are the bits.

For one image the calls of Python and their checks cost a small block a tenth of its time, and most of that is what they
push out of the processor's caches. What is here asks once per block whether anybody could notice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from dge_models.projections import has_hooks, hooked_everywhere, is_own_tensor

__all__ = ["PlainParts", "run_plain", "without_parts"]

_ops = torch.ops.dge_kernels
_NORMS = (nn.LayerNorm, LayerNorm)
_DROPS = (nn.Dropout, DropPath)


class PlainParts:
    """What :func:`run_plain` reads of a block, found once; :meth:`unchanged` asks whether it is still so.

    Args:
        block: A ``DGEBlock``.

    Attributes:
        usable: Whether all parts are of kinds whose ``forward`` is known here.
        k_norm: Modules to call, in order, where timm's attention calls its own: none where that does nothing.
        q_norm: The same.
        norm: The same.
        attended: The same, between the attention's projection and the addition.
        hidden: The same, between the layers of the MLP.
        changed: The same, between the MLP's last layer and the addition.
        gelu: The activation, if it is a GELU; None if it is another one, which is then in `hidden`.
    """

    def __init__(self, block: Any) -> None:
        attn, mlp, router = block.attn, block.mlp, block.router
        flat = type(mlp) is Mlp
        owners = [attn, router, *([mlp] if flat else [])]
        self._children = [(owner, tuple(owner._modules.values())) for owner in owners]
        self._own = tuple(block._modules.values())
        self._idle: list[nn.Module] = [attn.attn_drop]
        self.k_norm, self.q_norm, self.norm = (self._steps(part) for part in (attn.k_norm, attn.q_norm, attn.norm))
        self.attended = self._steps(attn.proj_drop, block.ls1, block.drop_path1)
        self.gelu = mlp.act if flat and type(mlp.act) is nn.GELU else None
        self.hidden = self._steps(*([mlp.act] if self.gelu is None else []), mlp.drop1, mlp.norm) if flat else []
        self._idle += [] if self.gelu is None else [self.gelu]
        self.changed = self._steps(*([mlp.drop2] if flat else []), block.ls2, block.drop_path2)
        self.linear = [attn.qkv, attn.proj, router.gate, *([mlp.fc1, mlp.fc2] if flat else [])]
        self.norms = [block.norm1, block.norm2]
        self._dropping = [part for part in self._idle[1:] if type(part) in _DROPS]
        self._parts = [*owners, *self.linear, *self.norms, *self._idle]
        self._types = [type(part) for part in self._parts]
        self._handles = -1
        self.usable = (
            type(attn) is Attention
            and getattr(attn, "gate", None) is None
            and all(type(part) is nn.Linear for part in self.linear)
            and all(type(part) in _NORMS for part in self.norms)
        )

    def _steps(self, *parts: nn.Module) -> list[nn.Module]:
        """Those that do anything in evaluation."""
        idle = [part for part in parts if type(part) is nn.Identity or type(part) in _DROPS]
        self._idle += idle
        return [part for part in parts if part not in idle]

    def same_parts(self, block: Any) -> bool:
        """Whether the block still consists of the modules that were found."""
        return tuple(block._modules.values()) == self._own and all(
            tuple(owner._modules.values()) == parts for owner, parts in self._children
        )

    def unchanged(self) -> bool:
        """Whether nobody waits for a call of these modules and all compute what they computed when they were found."""
        # Torch numbers every hook that is registered: without a new one, what was seen last time still holds.
        if self._handles != RemovableHandle.next_id:
            if any(map(has_hooks, self._parts)) or hooked_everywhere():
                return False
            self._handles = RemovableHandle.next_id
        return (
            list(map(type, self._parts)) == self._types
            and not any("forward" in part.__dict__ for part in self._parts)
            and not any(part.training for part in self._dropping)
            and not any(getattr(part, "_fast_norm", False) for part in self.norms)
        )


def without_parts(block: nn.Module) -> dict[str, Any]:
    """What a copy or a pickle of a block has: all but the parts, of which each finds its own."""
    return {name: value for name, value in vars(block).items() if name != "_plain"}


def _parts_of(block: Any) -> PlainParts | None:
    parts: PlainParts | None = vars(block).get("_plain")
    if parts is None or not parts.same_parts(block):
        parts = vars(block)["_plain"] = PlainParts(block)
    return parts if parts.usable and parts.unchanged() else None


def _fits(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> bool:
    """Whether tokens and setting are those for which no operator needs preparation."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 3
        and x.shape[0] > 0
        and x.shape[1] == num_prefix_tokens + grid[0] * grid[1]
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _weights(layer: Any) -> tuple[Any, Any]:
    parameters = layer._parameters
    return parameters.get("weight"), parameters.get("bias")


def _norm(x: Tensor, weights: tuple[Any, Any], eps: float) -> Tensor:
    """``F.layer_norm`` over the channels, without its look at cuDNN's flag."""
    return torch.layer_norm(x, (x.shape[-1],), weights[0], weights[1], eps, False)


def run_plain(block: Any, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor | None:
    """What a routed block gives in evaluation without gradients, if it has only plain parts and runs on a CPU.

    Args:
        block: A ``DGEBlock``, of no subclass.
        x: As ``DGEBlock.forward`` takes it.
        grid: As there.
        num_prefix_tokens: As there.

    Returns:
        Tokens of the shape of `x`; None where the modules have to be called.
    """
    if torch.compiler.is_compiling() or not _fits(x, grid, num_prefix_tokens):
        return None
    parts = _parts_of(block)
    if parts is None:
        return None
    qkv, gate, norm = _weights(parts.linear[0]), _weights(parts.linear[2]), _weights(parts.norms[0])
    if not (is_own_tensor(qkv[0]) and is_own_tensor(gate[0]) and gate[0].dtype == x.dtype and gate[1] is not None):
        return None
    splits, place = block.router.splits, (*grid, num_prefix_tokens)
    choice = _ops.route.default(x, *gate, splits[0], *place)
    patches, ends, longest = _ops.plan_queries.default(choice, splits, *place)
    queries = _ops.pool_queries.default(x, patches, *place)
    update = _attend(parts, block.attn, x, queries, qkv, norm, (ends, longest))
    hidden = queries.add_(update)
    normed = _norm(hidden, _weights(parts.norms[1]), parts.norms[1].eps)
    change = _mlp(parts, normed) if len(parts.linear) > 3 else block.mlp(normed)
    for step in parts.changed:
        change = step(change)
    return _ops.unpool_queries.default(torch.add(update, change, out=hidden), patches, x, *place)


def _attend(
    parts: PlainParts, attn: Any, x: Tensor, queries: Tensor, qkv: Any, norm: Any, ends: tuple[Tensor, int]
) -> Tensor:
    """What attention adds to the queries [Q, C]; `qkv` and `norm` are weights and biases."""
    heads, width, eps = attn.num_heads, attn.head_dim, parts.norms[0].eps
    inner = heads * width
    halves = [inner, 2 * inner]
    weight_q, weight_kv = torch.split_with_sizes(qkv[0], halves)
    bias_q, bias_kv = (None, None) if qkv[1] is None else torch.split_with_sizes(qkv[1], halves)
    kv = F.linear(_norm(x, norm, eps), weight_kv, bias_kv)
    k, v = kv.view(x.shape[0], x.shape[1], 2, heads, width).unbind(2)
    q = F.linear(_norm(queries, norm, eps), weight_q, bias_q).view(-1, heads, width)
    for step in parts.k_norm:
        k = step(k)
    for step in parts.q_norm:
        q = step(q)
    out = _ops.ragged_attention.default(q, k, v, *ends, attn.scale)[0].flatten(1)
    for step in parts.norm:
        out = step(out)
    out = F.linear(out, *_weights(parts.linear[1]))
    for step in parts.attended:
        out = step(out)
    return out


def _mlp(parts: PlainParts, normed: Tensor) -> Tensor:
    """timm's ``Mlp`` up to its last dropout."""
    hidden = F.linear(normed, *_weights(parts.linear[3]))
    hidden = hidden if parts.gelu is None else F.gelu(hidden, approximate=parts.gelu.approximate)
    for step in parts.hidden:
        hidden = step(hidden)
    return F.linear(hidden, *_weights(parts.linear[4]))
