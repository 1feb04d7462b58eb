"""A family of its own, in one file: nothing in the package has to know it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from small_models import SMALL, SMALL_PYRAMID, scatter_routing
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dge_models import DGEBlock, count_macs, families, from_timm, load_checkpoint, set_fixed_queries, trace
from dge_models.attention import Kernel
from dge_models.encoder import Heads, Patches, set_training_mode
from dge_models.families import Family, family_of, find_family, register_family
from dge_models.macs import LayerMacs, ModelMacs, single_grid_macs
from dge_models.reference_keys import to_timm_keys
from dge_models.routed import RoutedTransformer, routed_blocks
from dge_models.router import deterministic_routing


class SlopeBlock(Block):
    """A block whose queries and keys know their rows and columns, as rotary embeddings make them."""

    def forward(self, x: Tensor, slope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.gamma * self.attn(self.norm1(x) + slope)
        return x + self.gamma * self.mlp(self.norm2(x))


class SlopeModel(nn.Module):
    """Has timm's names for its parts, and is none of timm's classes."""

    def __init__(self, depth: int = 2, num_classes: int = 5) -> None:
        super().__init__()
        inner = timm.create_model("deit_tiny_patch16_256", **{**SMALL, "depth": depth, "num_classes": num_classes})
        self.patch_embed, self.pos_embed, self.cls_token = inner.patch_embed, inner.pos_embed, inner.cls_token
        self.blocks = nn.ModuleList([SlopeBlock(SMALL["embed_dim"], 2) for _ in range(depth)])
        for block in self.blocks:
            del block.ls1, block.ls2
            block.gamma = nn.Parameter(torch.ones(SMALL["embed_dim"]))
        self.norm, self.head, self.attn_pool = inner.norm, inner.head, None
        self.norm_pre, self.patch_drop = nn.Identity(), None
        self.num_prefix_tokens, self.no_embed_class, self.grad_checkpointing = 1, False, False
        self.slope = nn.Parameter(torch.randn(2, SMALL["embed_dim"]))

    def _pos_embed(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def slopes(self, grid: tuple[int, int]) -> Tensor:
        rows, cols = (torch.arange(float(length)) for length in grid)
        spatial = torch.cartesian_prod(rows, cols) @ self.slope
        return torch.cat([torch.zeros(1, spatial.shape[1]), spatial])

    def forward_head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x[:, 0])
        return logits

    def forward(self, x: Tensor) -> Tensor:
        slope = self.slopes(self.patch_embed.grid_size)
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x, slope)
        return self.forward_head(self.norm(x))


class DGESlopeBlock(DGEBlock, SlopeBlock):
    plain = SlopeBlock
    parts: ClassVar = DGEBlock.parts - {"ls1", "ls2"}
    gamma: Tensor

    def make_keys(self, normed: Tensor, grid: tuple[int, int], positions: Any) -> Heads:
        return super().make_keys(normed + positions[1], grid, positions)

    def attend(self, normed: Tensor, keys: Heads, kernel: Kernel, positions: Any, patches: Patches) -> Tensor:
        slope, _ = positions
        row, col, side = patches().unbind(-1)
        centre = torch.stack([row, col], -1) + (side.unsqueeze(-1) - 1) / 2
        own = torch.where(row.unsqueeze(-1) < 0, 0.0, centre) @ slope
        return super().attend(normed + own, keys, kernel, positions, patches)

    def scale_attention(self, update: Tensor) -> Tensor:
        return self.gamma * update

    def scale_mlp(self, update: Tensor) -> Tensor:
        return self.gamma * update


class DGESlopeModel(RoutedTransformer, SlopeModel):
    def _positions(self, grid: tuple[int, int]) -> Sequence[Any]:
        return [(self.slope, self.slopes(grid))] * len(self.blocks)

    def _run_plain(self, block: nn.Module, x: Tensor, positions: Any) -> Tensor:
        out: Tensor = block(x, positions[1])
        return out


class Slopes(Family):
    models = (SlopeModel,)
    converts: ClassVar = {SlopeModel: DGESlopeModel}
    weights = "slopes"

    def model_macs(self, model: Any, grid: tuple[int, int]) -> ModelMacs:
        return single_grid_macs(model, grid, lambda block, tokens, grid: LayerMacs(1000, 10, tokens))

    def owns_keys(self, keys: Iterable[str]) -> bool:
        return "slope" in keys


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of a third family, known for the time of a test."""
    monkeypatch.setattr(families, "_families", list(families._families))
    register_family(Slopes())
    return SlopeModel().eval()


def test_every_model_finds_its_family() -> None:
    deit = timm.create_model("deit_tiny_patch16_256", **SMALL)
    pyramid = timm.create_model("pvt_dge_s124_tiny_256", **SMALL_PYRAMID)
    assert family_of(deit) is find_family(from_timm(deit)) is not None
    assert family_of(pyramid) is not family_of(deit)
    assert find_family(nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match=r"model: got Linear; expected .*VisionTransformer, PyramidVisionTransformer"):
        family_of(nn.Linear(1, 1))
    assert family_of(deit).input_size(deit) == (32, 32)
    assert family_of(pyramid).input_size(pyramid) == (64, 64)


def test_a_third_family_is_converted_as_it_is_until_it_is_trained(model: Any) -> None:
    images = torch.randn(2, 3, 32, 32)
    routed = from_timm(model, layers=[1])
    assert type(routed) is DGESlopeModel
    assert [isinstance(block, DGEBlock) for block in routed.blocks] == [False, True]
    with torch.no_grad():
        torch.testing.assert_close(routed(images), model(images))
    torch.testing.assert_close(from_timm(model)(images), model(images))


def test_a_third_familys_queries_are_placed_alike_in_every_mode(model: Any) -> None:
    routed: Any = scatter_routing(from_timm(model))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = routed(images)
        assert len(torch.stack(trace(routed, images).granularity).unique()) == 3
    torch.testing.assert_close(routed(images), expected)
    for mode in ("dense", "sparse"):
        set_training_mode(routed.train(), mode)  # type: ignore[arg-type]
        with deterministic_routing():
            torch.testing.assert_close(routed(images), expected)
    image = images[:1]
    choices = [routing.choice.flatten() for routing in routed.eval().forward_routed(image)[1]]
    set_fixed_queries(routed, [tuple(choice.bincount(minlength=3).tolist()) for choice in choices])
    torch.testing.assert_close(routed(image), expected[:1])


def test_a_third_family_brings_its_costs_and_its_keys(model: Any, tmp_path: Path) -> None:
    routed: Any = from_timm(model)
    count = count_macs(routed, torch.zeros(1, 3, 32, 32))
    assert count.static_layers.tolist() == [1000 + 10 * 65] * 2
    torch.save(routed.state_dict(), tmp_path / "weights.pth")
    load_checkpoint(from_timm(model), tmp_path / "weights.pth")
    pyramid = timm.create_model("pvt_tiny_256", **SMALL_PYRAMID)
    with pytest.raises(ValueError, match=r"holds .*; expected a pyramid's"):
        load_checkpoint(pyramid, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds a pyramid \(PVT\); expected weights of a DGESlopeModel"):
        routed.load_state_dict(pyramid.state_dict())
    assert to_timm_keys(routed.state_dict()).keys() == routed.state_dict().keys()


def test_what_a_third_family_can_convert_is_named(model: Any) -> None:
    with pytest.raises(
        ValueError, match="expected timm's VisionTransformer, VisionTransformerDistilled, Eva or SlopeModel"
    ):
        from_timm(nn.Linear(1, 1))
    assert routed_blocks(model) == []
    assert not isinstance(model, VisionTransformer)
