"""peft's adapters have the effect on a routed model that they have on the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from companion import companion
from layer_pairs import KINDS, PROJECTIONS, assert_same, assert_trains_alike, images, pair, trained
from small_models import build_small
from torch import nn

from dge_models import BudgetLoss, count_macs, from_timm, set_budget
from dge_models.routed import routed_blocks

peft = companion("peft")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_adapter = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


def _adapt(model: nn.Module, kind: str, **settings: Any) -> Any:
    """The model with an adapter on every projection of its attentions, away from zero."""
    targets = rf".*\.attn\.({'|'.join(PROJECTIONS[kind])})"
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": targets, **settings})).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return adapted


@every_kind
@every_adapter
def test_an_adapter_added_after_conversion(kind: str, use_dora: bool) -> None:
    plain, routed = pair(kind)
    pixels = images(kind)
    before = plain(pixels).detach()
    plain, routed = (_adapt(model, kind, use_dora=use_dora) for model in (plain, routed))
    assert (plain(pixels) - before).abs().max() > 1e-3
    assert_same(plain, routed.get_base_model(), pixels)


@every_adapter
def test_an_adapter_added_before_conversion(use_dora: bool) -> None:
    plain = _adapt(pair("deit")[0], "deit", use_dora=use_dora)
    routed = from_timm(plain.get_base_model())
    assert_same(plain, routed, images("deit"))
    steps = trained(routed, images("deit"))
    assert all(step.abs().max() > 0 for name, step in steps.items() if "lora_" in name)


@every_kind
@every_adapter
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_gradient_reaches_the_adapters(kind: str, use_dora: bool, mode: str) -> None:
    plain, routed = (_adapt(model, kind, use_dora=use_dora) for model in pair(kind))
    pixels = images(kind)
    assert_trains_alike(plain, routed, pixels, mode)
    gradients = {name: parameter.grad for name, parameter in routed.named_parameters() if parameter.requires_grad}
    assert len([name for name in gradients if "lora_A" in name]) == len(PROJECTIONS[kind]) * len(routed_blocks(routed))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@every_kind
@every_adapter
def test_merging_an_adapter_changes_nothing(kind: str, use_dora: bool) -> None:
    routed = _adapt(pair(kind)[1], kind, use_dora=use_dora)
    pixels = images(kind)
    with torch.no_grad():
        adapted, macs = routed(pixels), count_macs(routed.get_base_model(), pixels)
        merged = routed.merge_and_unload()
        torch.testing.assert_close(merged(pixels), adapted, atol=1e-5, rtol=0)
        assert all(type(block.attn.proj) is nn.Linear for block in routed_blocks(merged))
        assert torch.equal(count_macs(merged, pixels).total, macs.total)


@every_kind
@pytest.mark.parametrize("saved", ["gate", "router"])
def test_gates_train_beside_an_adapter_and_take_a_budget(kind: str, saved: str) -> None:
    name = "deit_dge_s124_tiny_patch16_256" if kind == "deit" else "pvt_dge_s124_tiny_256"
    routed, pixels = _adapt(build_small(name), kind, modules_to_save=[saved]), images(kind)
    base = routed.get_base_model()
    logits, routings = routed.train()(pixels, return_routing=True)
    (logits.square().mean() + BudgetLoss(target=0.5)(base, routings)).backward()
    own = {name: parameter.grad for name, parameter in routed.named_parameters() if "modules_to_save" in name}
    assert len(own) == 2 * len(routed_blocks(base))
    assert all(grad is not None and grad.abs().max() > 0 for grad in own.values())
    setting = set_budget(base.eval(), 0.6, [pixels], tolerance=0.1)
    assert setting.ratio == pytest.approx(0.6, abs=0.1)


def test_a_gate_with_an_adapter_is_called() -> None:
    routed, pixels = build_small(), images("deit")
    before = routed.forward_routed(pixels)[1]
    adapted = _adapt(routed, "deit", target_modules=r".*\.router\.gate").get_base_model()
    with torch.no_grad():
        for block in adapted.blocks:
            block.router.gate.lora_B["default"].weight.mul_(300)
        after = adapted.forward_routed(pixels)[1]
        assert not all(torch.equal(a.choice, b.choice) for a, b in zip(before, after, strict=True))
        block = adapted.blocks[0]
        tokens, grid, _ = adapted._embed(pixels)
        assert torch.equal(after[0].choice.long(), block.router.logits(tokens, grid, 1).argmax(-1))
