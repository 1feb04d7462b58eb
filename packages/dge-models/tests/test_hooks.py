"""Hooks on parts of a routed block are called, or refused with the reason; none waits for ever."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from layer_pairs import images, pair
from small_models import SMALL, Build
from timm.utils import AttentionExtract

from dge_kernels import plan_queries
from dge_models import from_timm, set_fixed_queries, set_training_mode

every_name = pytest.mark.parametrize(
    "name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
)


@every_name
def test_hooks_fire_on_all_parts_of_a_block_on_every_path(small: Build, name: str) -> None:
    model, pixels = small(name, drop_path_rate=0.1), images(name)
    block = next(module for module in model.modules() if hasattr(module, "router"))
    never = {"", "attn", "attn.attn_drop", "router"}
    parts = [part for part, module in block.named_modules() if part not in never]
    called: list[str] = []
    for part in parts:
        block.get_submodule(part).register_forward_hook(lambda module, args, out, part=part: called.append(part))
    for path in ("dynamic", "fixed", "dense", "sparse"):
        called.clear()
        if path == "fixed":
            set_fixed_queries(model, 0.6)
        if path in ("dense", "sparse"):
            set_training_mode(model, path)
            model.train()
        with torch.set_grad_enabled(model.training):
            model(pixels)
        assert set(called) == set(parts), path


REGISTRATIONS = {
    "forward": lambda module: module.register_forward_hook(lambda *args: None),
    "forward_pre": lambda module: module.register_forward_pre_hook(lambda *args: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *args: None),
    "backward_pre": lambda module: module.register_full_backward_pre_hook(lambda *args: None),
}


@every_name
@pytest.mark.parametrize("part", ["attn", "attn.attn_drop"])
@pytest.mark.parametrize("kind", REGISTRATIONS)
def test_what_a_routed_block_never_calls_is_refused_by_name(small: Build, name: str, part: str, kind: str) -> None:
    model, pixels = small(name), images(name)
    block = "blocks.1" if name.startswith("deit") else "stages.1.blocks.1"
    handle = REGISTRATIONS[kind](model.get_submodule(f"{block}.{part}"))
    for training in (False, True):
        with pytest.raises(RuntimeError, match=rf"^{block}\.{part}: got a hook or another forward; expected none"):
            model.train(training)(pixels)
    handle.remove()
    model(pixels)


def test_a_hook_on_a_router_is_called_or_refused(small: Build) -> None:
    model, pixels, seen = small(), images("deit"), []
    with torch.no_grad():
        expected = model(pixels)
        model.blocks[1].router.register_forward_hook(lambda module, args, out: seen.append(out.choice.clone()))
        logits, routings = model.forward_routed(pixels)
    torch.testing.assert_close(logits, expected)
    assert torch.equal(seen[0], routings[1].choice)
    assert len(seen) == 1
    set_fixed_queries(model, 0.6)
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.router: got a hook .* with fixed queries"):
        model(pixels)


def test_a_replaced_forward_of_an_attention_is_refused(small: Build) -> None:
    model = small()
    model.blocks[2].attn.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"^blocks\.2\.attn: got a hook"):
        model(images("deit"))


def test_attention_maps_of_routed_blocks_are_refused_not_missing() -> None:
    plain = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
    for block in plain.blocks:
        block.attn.fused_attn = False
    pixels = images("deit")
    partly = from_timm(plain, layers=[1])
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.attn\.attn_drop.*no attention map.*dge_models\.trace"):
        AttentionExtract(copy.deepcopy(partly), method="hook")(pixels)
    with pytest.raises(RuntimeError, match="No node names found"):
        AttentionExtract(from_timm(plain), method="fx")
    # Of blocks that do not route there are maps.
    maps = AttentionExtract(copy.deepcopy(partly), ["blocks.[02].attn.attn_drop"], method="hook")(pixels)
    assert [tuple(part.shape) for part in maps.values()] == [(2, 2, 65, 65)] * 2
    maps = AttentionExtract(copy.deepcopy(partly), method="fx")(pixels)
    assert list(maps) == ["blocks.0.attn.softmax", "blocks.2.attn.softmax"]


@pytest.mark.parametrize("part", ["attn.proj", "attn.q_norm", "norm2", "mlp"])
def test_an_extractor_gets_the_queries_in_the_order_of_the_plan(part: str) -> None:
    plain, routed = pair("deit")
    pixels = images("deit")
    expected = AttentionExtract(plain, [f"blocks.?.{part}"], method="hook")(pixels)
    with torch.no_grad():
        got = AttentionExtract(routed, [f"blocks.?.{part}"], method="hook")(pixels)
        choice = routed.forward_routed(pixels)[1][0].choice
    image, y, x, _ = plan_queries(choice, grid=(8, 8), num_prefix_tokens=1).patches.long().unbind(1)
    token = torch.where(y < 0, 0, 1 + 8 * y + x)
    assert list(got) == list(expected) == [f"blocks.{index}.{part}" for index in range(3)]
    for name, value in expected.items():
        tokens = value.transpose(1, 2) if part == "attn.q_norm" else value  # timm's are [B, h, N, d]
        torch.testing.assert_close(got[name], tokens[image, token], atol=1e-5, rtol=0)


def test_a_hooked_projection_is_called_with_all_tokens_then_with_the_queries(small: Build) -> None:
    model, seen = small(), []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        queries = model.forward_routed(images("deit"))[1][1].queries
    assert seen == [(2, 65, 96), (int(queries.sum()), 96)]
