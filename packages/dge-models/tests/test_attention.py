from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import Attention, AttentionRope, LayerNorm
from torch import nn
from torch.nn.utils import prune

from dge_models.attention import TIMM_ATTENTION, attend, full_attention, input_width, keys_values, refuse_unsupported
from dge_models.pvt_block import DGEPyramidBlock, ReducedAttention


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True, "norm_layer": LayerNorm},
        {"scale_norm": True, "norm_layer": LayerNorm},
    ],
)
def test_attending_to_oneself_is_timms_attention(options: dict[str, object]) -> None:
    attn = Attention(24, num_heads=3, **options).eval()
    x = torch.randn(2, 7, 24)
    out = attend(attn, x, *keys_values(attn, x), partial(full_attention, scale=attn.scale))
    torch.testing.assert_close(out, attn(x))


@pytest.mark.parametrize("pruned", [False, True])
def test_keys_and_values_in_an_onnx_export_are_the_same(pruned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = Attention(24, num_heads=3, qkv_bias=True).eval()
    if pruned:  # then the layer has to be called, once
        prune.l1_unstructured(attn.qkv, "weight", 0.5)
    x = torch.randn(2, 7, 24)
    expected = keys_values(attn, x)
    widths: list[int] = []
    linear = nn.functional.linear
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, weight, bias: widths.append(len(weight)) or linear(x, weight, bias)
    )
    for got, want in zip(keys_values(attn, x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert widths == ([72] if pruned else [24, 24])


def test_the_output_gate_of_newer_timm_is_honoured() -> None:
    if "gated" not in Attention.__init__.__annotations__:
        pytest.skip("this timm has no gated attention")
    attn = Attention(24, num_heads=3, gated=True)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(
        attend(attn, x, *keys_values(attn, x), partial(full_attention, scale=attn.scale)), attn(x)
    )


def _with(**parts: nn.Module) -> Attention:
    attn = Attention(8, num_heads=2)
    for name, part in parts.items():
        setattr(attn, name, part)
    return attn


@pytest.mark.parametrize(
    ("attn", "reason"),
    [
        (AttentionRope(8, num_heads=2), "got AttentionRope"),
        (Attention(8, num_heads=2, attn_drop=0.1), "dropout is 0.1"),
        (_with(rotary=nn.Linear(2, 2)), r"unknown parts \['rotary'\]"),
        (ReducedAttention(8, num_heads=2, sr_ratio=2, attn_drop=0.2), "dropout is 0.2"),
        (ReducedAttention(8, num_heads=2, linear_attn=True), r"unknown parts \['act', 'pool'\]"),
        (_with(qkv=nn.Sequential(nn.Linear(8, 24))), "attn.qkv: got Sequential"),
    ],
)
def test_other_attention_is_refused_with_the_reason(attn: nn.Module, reason: str) -> None:
    known = DGEPyramidBlock.attention if isinstance(attn, ReducedAttention) else TIMM_ATTENTION
    with pytest.raises(ValueError, match=reason):
        refuse_unsupported(attn, "blocks.0.attn", known)


def test_an_attention_takes_tokens_of_one_width() -> None:
    assert input_width(ReducedAttention(24, num_heads=3)) == input_width(Attention(24, num_heads=3)) == 24
