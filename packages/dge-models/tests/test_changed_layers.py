"""What PyTorch alone can do to a linear layer has the effect on a routed model that it has on the plain one."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from layer_pairs import KINDS, assert_same, assert_same_fixed, assert_trains_alike, change, images, pair, trained
from small_models import Build
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dge_models import count_macs, from_timm, mean_counts, set_budget, set_fixed_queries

every_kind = pytest.mark.parametrize("kind", KINDS)
every_name = pytest.mark.parametrize(
    "name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
)


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


class _LowRank(nn.Module):
    """An adapter as people write it: the layer and a product beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _subclassed(owner: Any, name: str) -> None:
    getattr(owner, name).__class__ = _Scaled


def _wrapped(owner: Any, name: str) -> None:
    setattr(owner, name, _LowRank(getattr(owner, name)))


def _replaced_forward(owner: Any, name: str) -> None:
    layer = getattr(owner, name)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) * 1.5


def _pruned(owner: Any, name: str) -> None:
    prune.l1_unstructured(getattr(owner, name), "weight", amount=0.5)


def _bias_pruned(owner: Any, name: str) -> None:
    prune.l1_unstructured(getattr(owner, name), "bias", amount=0.5)


def _normalised(owner: Any, name: str) -> None:
    parametrizations.weight_norm(getattr(owner, name))
    with torch.no_grad():
        getattr(owner, name).parametrizations.weight.original0.mul_(1.5)


def _orthogonal(owner: Any, name: str) -> None:
    parametrizations.orthogonal(getattr(owner, name))


def _spectral(owner: Any, name: str) -> None:
    parametrizations.spectral_norm(getattr(owner, name))


def _output_hooked(owner: Any, name: str) -> None:
    getattr(owner, name).register_forward_hook(lambda module, args, out: out * 1.5)


def _input_hooked(owner: Any, name: str) -> None:
    getattr(owner, name).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def _gradient_hooked(owner: Any, name: str) -> None:
    getattr(owner, name).register_full_backward_hook(lambda module, into, out: tuple(0.5 * grad for grad in into))


def _name(how: Any) -> str:
    return str(how.__name__).strip("_")


OF_VALUES = [
    _subclassed,
    _wrapped,
    _replaced_forward,
    _pruned,
    _bias_pruned,
    _normalised,
    _orthogonal,
    _spectral,
    _output_hooked,
    _input_hooked,
]
FIRST = [how for how in OF_VALUES if how is not _replaced_forward]  # whose function would still mean the old layer
IN_TRAINING = [how for how in [*OF_VALUES, _gradient_hooked] if how is not _spectral]  # it counts its own calls


@every_kind
@pytest.mark.parametrize("how", OF_VALUES, ids=_name)
def test_what_changes_a_plain_model_changes_a_routed_one(kind: str, how: Any) -> None:
    plain, routed = pair(kind)
    pixels = images(kind)
    before = plain(pixels).detach()
    change(plain, kind, how)
    change(routed, kind, how)
    assert (plain(pixels) - before).abs().max() > 1e-3
    assert_same(plain, routed, pixels)


@pytest.mark.parametrize("how", FIRST, ids=_name)
def test_a_changed_model_is_converted(how: Any) -> None:
    plain, _ = pair("deit")
    change(plain, "deit", how)
    assert_same(plain, from_timm(plain), images("deit"))


@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("how", IN_TRAINING, ids=_name)
def test_a_changed_model_trains_as_the_plain_one(kind: str, mode: str, how: Any) -> None:
    plain, routed = pair(kind)
    change(plain, kind, how)
    change(routed, kind, how)
    assert_trains_alike(plain, routed, images(kind), mode)


@every_kind
def test_the_gradient_reaches_what_spectral_norm_parametrises(kind: str) -> None:
    _, routed = pair(kind)
    change(routed, kind, _spectral)
    routed.train()(images(kind)).square().mean().backward()
    originals = [parameter for name, parameter in routed.named_parameters() if name.endswith("weight.original")]
    assert originals
    assert all(parameter.grad.abs().max() > 0 for parameter in originals)


@every_kind
def test_pruning_made_permanent_leaves_plain_layers(kind: str) -> None:
    _, routed = pair(kind)
    change(routed, kind, _pruned)
    pixels = images(kind)
    pruned = routed(pixels).detach()
    change(routed, kind, lambda owner, name: prune.remove(getattr(owner, name), "weight"))
    torch.testing.assert_close(routed(pixels), pruned)


def _quantised(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor.* are deprecated", UserWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@every_kind
def test_dynamic_quantisation_errs_as_on_the_plain_model(kind: str) -> None:
    plain, routed = pair(kind)
    pixels = images(kind)
    exact = plain(pixels).detach()
    expected = _quantised(plain)(pixels)
    error = (expected - exact).abs().max().item()
    assert error > 1e-3
    candidates = [_quantised(routed)] + ([from_timm(_quantised(plain))] if kind == "deit" else [])
    for quantised in candidates:
        with torch.no_grad():
            torch.testing.assert_close(quantised(pixels), expected, atol=0.1 * error, rtol=0)
        assert_same_fixed(quantised, expected, pixels, atol=0.1 * error)


def test_a_quantised_model_is_counted_and_its_budget_is_set_before(small: Build) -> None:
    model = small()
    quantised, pixels = _quantised(model), images("deit")
    assert not isinstance(quantised.blocks[0].router.gate, nn.Linear)
    assert count_macs(quantised, pixels).static_total == count_macs(model, pixels).static_total
    assert mean_counts(quantised, [pixels])
    with pytest.raises(ValueError, match="set the budget before quantising"):
        set_budget(quantised, 0.6, [pixels])


class _Same(nn.Linear):
    """Not plain, and no different."""


def _same(model: Any) -> Any:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Same
    return model


@every_name
def test_called_layers_give_what_slices_give_on_every_path(small: Build, name: str) -> None:
    model = small(name)
    called, pixels = _same(copy.deepcopy(model)), images(name)
    with torch.no_grad():
        torch.testing.assert_close(called(pixels), model(pixels))
        choices = [[routing.choice for routing in m.forward_routed(pixels)[1]] for m in (model, called)]
        assert all(torch.equal(a, b) for a, b in zip(*choices, strict=True))
        assert len(set(torch.cat([choice.flatten() for choice in choices[0]]).tolist())) == 3
        for fixed in (model, called):
            set_fixed_queries(fixed, 0.6)
        torch.testing.assert_close(called(pixels), model(pixels))
    for mode in ("dense", "sparse"):
        for step, expected in zip(
            trained(called, pixels, mode).values(), trained(model, pixels, mode).values(), strict=True
        ):
            torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-3)


@every_name
def test_called_layers_are_compiled_as_one_graph_and_exported(small: Build, name: str) -> None:
    model, pixels = _same(small(name)), images(name)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixels), model(pixels))
        set_fixed_queries(model, 0.6)
        torch.testing.assert_close(torch.export.export(model, (pixels,)).module()(pixels), model(pixels))


class _LinearWidths(TorchFunctionMode):
    """Notes how many outputs each linear layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.seen[args[1].shape[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_of_plain_layers_only_what_is_needed_is_computed(small: Build, training: bool) -> None:
    """DeiT of width 32: 32 outputs for queries, 64 for keys and values, never all 96."""
    model = small().train(training)
    with _LinearWidths() as plain:
        model(images("deit"))
    assert plain.seen[96] == 0
    assert plain.seen[64] == 3
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: None)
    with _LinearWidths() as hooked:
        model(images("deit"))
    assert (hooked.seen[96], hooked.seen[64]) == (2, 2)


def test_a_captured_graph_of_plain_layers_computes_slices(small: Build) -> None:
    model, pixels = small(), images("deit")
    set_fixed_queries(model, 0.6)
    with torch.no_grad():
        for strict in (False, True):
            graph = torch.export.export(model, (pixels,), strict=strict).graph
            linears = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]
            widths = Counter(node.args[1].meta["val"].shape[0] for node in linears)
            assert widths[64] == 3
            assert widths[96] == 0


def test_watching_all_modules_changes_nothing_and_a_hook_for_all_modules_is_called(small: Build) -> None:
    model, pixels = small(), images("deit")
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        model(pixels)
    called: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, out: called.append(module))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as observed:
            model(pixels)
    finally:
        handle.remove()
    assert {block.attn.qkv for block in model.blocks} | {block.router.gate for block in model.blocks} <= set(called)
    assert observed.get_total_flops() > alone.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _LinearWidths() as linear:
        model(pixels)
    assert linear.seen[96] == 0
    assert counter.get_total_flops() == alone.get_total_flops()


@every_kind
def test_meta_models_have_shapes_and_come_back(kind: str) -> None:
    plain, routed = pair(kind)
    pixels, weights = images(kind), copy.deepcopy(routed.state_dict())
    set_fixed_queries(routed, 1.0)
    routed.to("meta")
    assert routed(pixels.to("meta")).shape == (2, 7)
    assert routed.train()(pixels.to("meta")).shape == (2, 7)
    change(routed, kind, _output_hooked)
    assert routed.eval()(pixels.to("meta")).shape == (2, 7)
    change(plain, kind, _output_hooked)
    routed.to_empty(device="cpu")
    routed.load_state_dict(weights)
    for module in routed.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert_same(plain, routed, pixels)
