"""The router: one linear layer over a region's mean token, and the Gumbel noise that it trains with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from dge_kernels import route
from dge_models.projections import is_plain, placement
from dge_models.routing import Routing, check_splits, region_grid, straight_through

__all__ = ["Router", "deterministic_routing", "gumbel_noise", "region_means", "split_costs"]

_FINEST_PROBABILITY = 0.95
_deterministic = False


@contextmanager
def deterministic_routing() -> Iterator[None]:
    """Train without Gumbel noise: inside, a router in training takes the argmax, straight-through.

    For tests and for comparing runs. It acts on the whole process and on forward passes only: a backward
    pass may run outside. Evaluation is deterministic anyway.
    """
    global _deterministic
    before, _deterministic = _deterministic, True
    try:
        yield
    finally:
        _deterministic = before


def gumbel_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard Gumbel noise, float32, from torch's generator of `device`.

    Drawn as ``torch.nn.functional.gumbel_softmax`` draws it, so that equal seeds give equal noise.
    """
    return -torch.empty(shape, dtype=torch.float32, device=device).exponential_().log()


def region_means(spatial: Tensor, size: int) -> Tensor:
    """Mean token of each region, accumulated in float32.

    Args:
        spatial: [B, H, W, C], any floating dtype.
        size: S, the region's side in tokens. Regions are clipped at the bottom and right edge; a mean is
            over the tokens that exist.

    Returns:
        float32 [B, ⌈H/S⌉, ⌈W/S⌉, C] (float64 for a float64 input).
    """
    wide = spatial if spatial.dtype == torch.float64 else spatial.float()
    means = F.avg_pool2d(wide.permute(0, 3, 1, 2), size, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1)


def split_costs(splits: tuple[int, ...]) -> Tensor:
    """What each split costs: its queries per token of a region, float32 [n], 1 for the finest.

    Also the direction along which logits are shifted to change a model's budget: with a price per query on top
    of what a router finds a split worth, the dearest splits are given up first.
    """
    return torch.tensor([(k / splits[0]) ** 2 for k in splits])


class Router(nn.Module):
    """Chooses one split per region from the region's mean token.

    Logits, noise and softmax are float32 whatever the model's dtype or autocast. A gate that something has changed
    (an adapter, quantisation, a hook) is called, in its own dtype.

    Source: Song et al., NeurIPS 2021, section 3.1; the initialisation is the reference's.

    Args:
        dim: C, the tokens' width.
        splits: Queries per region side, finest first.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        shift: float32 [n] or None: added to the logits in training, not part of the weights; see
            :meth:`shift_training`.
    """

    shift: Tensor | None

    def __init__(
        self,
        dim: int,
        splits: tuple[int, ...] = (4, 2, 1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.splits = check_splits(splits)
        self.gate = nn.Linear(dim, len(self.splits), device=device, dtype=dtype)
        # A tensor and no number, so that a compiled model takes another value without being compiled again.
        self.register_buffer("shift", None, persistent=False)
        self._shift_amount: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small weights, and biases that give the finest split a probability of 0.95; keep a shift of training."""
        n = len(self.splits)
        bias = 0.5 * math.log(_FINEST_PROBABILITY * (n - 1) / (1 - _FINEST_PROBABILITY)) if n > 1 else 0.0
        with torch.no_grad():
            trunc_normal_(self.gate.weight, std=0.01)
            self.gate.bias.fill_(-bias)
            self.gate.bias[0] = bias
        self.init_non_persistent_buffers()

    def init_weights(self) -> None:
        """Initialise again; the name under which timm's weight initialisation looks for it."""
        self.reset_parameters()

    def init_non_persistent_buffers(self) -> None:
        """Compute the shift again, where timm's tools ask for it: after a move to uninitialised memory."""
        self.shift_training(self._shift_amount)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Beside the weights, in the state dict's metadata, the split set that they are for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["splits"] = list(self.splits)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        stored = local_metadata.get("splits")
        if stored is not None and tuple(stored) != self.splits:
            lists[-1].append(f"{prefix[:-1]}: the weights' splits are {tuple(stored)}; expected {self.splits}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """The split set, for ``print(model)``."""
        return f"splits={self.splits}"

    def draw_noise(self, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """The noise of one training step.

        Args:
            batch: B, images.
            grid: (H, W) of the token grid.
            device: Where the tokens are.

        Returns:
            float32 [B, ⌈H/S⌉, ⌈W/S⌉, n] Gumbel noise; zeros under :func:`deterministic_routing`; None in
            evaluation.
        """
        if not self.training:
            return None
        shape = (batch, *region_grid(grid, self.splits), len(self.splits))
        return torch.zeros(shape, device=device) if _deterministic else gumbel_noise(shape, device)

    def shift_training(self, amount: float | None) -> None:
        """Make fine splits more likely in training, or less, until told otherwise; evaluation ignores it.

        Args:
            amount: What the finest split's logit gains over that of a split with no queries, see
                :func:`split_costs`; None means no shift.
        """
        self._shift_amount = amount
        if amount is None:
            self.shift = None
            return
        if self.shift is None:
            self.shift = torch.zeros(len(self.splits), device=placement(self.gate)[0])
        self.shift.copy_(split_costs(self.splits) * amount)

    def logits(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
        """Gate logits of every region.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first.
            grid: (H, W).
            num_prefix_tokens: T.

        Returns:
            float32 [B, ⌈H/S⌉, ⌈W/S⌉, n] (float64 for float64 tokens).
        """
        return self.logits_of(region_means(torch.unflatten(x[:, num_prefix_tokens:], 1, grid), self.splits[0]))

    def logits_of(self, means: Tensor) -> Tensor:
        """Gate logits of every region, where its mean token is known.

        Args:
            means: float32 [B, ⌈H/S⌉, ⌈W/S⌉, C], as from :func:`region_means`.

        Returns:
            As :meth:`logits`.
        """
        # On the meta device there is no autocast to leave.
        with nullcontext() if means.is_meta else torch.autocast(means.device.type, enabled=False):
            if is_plain(self.gate):
                weight, bias = self.gate.weight.to(means.dtype), self.gate.bias.to(means.dtype)
                if torch.onnx.is_in_onnx_export():
                    return _linear_from_the_left(means, weight, bias)
                return F.linear(means, weight, bias)
            logits: Tensor = self.gate(means.to(placement(self.gate)[1]))
            return logits.to(means.dtype)

    def choose(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
        """The most probable split of every region, without gradient; with a plain gate in one pass over the tokens.

        Takes what :meth:`logits` takes and returns uint8 [B, ⌈H/S⌉, ⌈W/S⌉].
        """
        gate = self.gate
        if not is_plain(gate):
            return self.logits(x, grid, num_prefix_tokens).argmax(-1).to(torch.uint8)
        return route(
            x,
            gate.weight,
            gate.bias,
            grid=grid,
            splits=self.splits,
            num_prefix_tokens=num_prefix_tokens,
        )

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        noise: Tensor | None = None,
    ) -> Routing:
        """Route with a gradient: the straight-through argmax of the logits plus `noise`.

        Args:
            x: [B, T + H·W, C] tokens, prefix tokens first, before the block's first norm.
            grid: (H, W).
            num_prefix_tokens: T.
            noise: float32 [B, ⌈H/S⌉, ⌈W/S⌉, n] added to the logits; None adds nothing and chooses as
                evaluation without gradients does.

        Returns:
            The layer's routing; `gate` and `queries` differentiate to the router and to `x`.

        Raises:
            ValueError: `noise` has another shape.
        """
        logits = self.logits(x, grid, num_prefix_tokens)
        if self.training and self.shift is not None:
            logits = logits + self.shift
        quiet = logits.detach()
        if noise is None:
            choice = self.choose(x.detach(), grid, num_prefix_tokens)
        else:
            if noise.shape != logits.shape:
                raise ValueError(f"noise: got shape {tuple(noise.shape)}; expected {tuple(logits.shape)}")
            logits = logits + noise
            choice = logits.argmax(-1)
        gate = straight_through(logits, choice)
        return Routing.from_gate(choice, gate, grid, num_prefix_tokens, self.splits, quiet)


def _linear_from_the_left(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` of [B, H, W, C], the weight on the left: OpenVINO is several times slower with a few columns."""
    product = torch.matmul(weight.unsqueeze(0), x.flatten(1, 2).transpose(1, 2)) + bias.unsqueeze(1)
    return torch.unflatten(product.transpose(1, 2), 1, x.shape[1:3])
