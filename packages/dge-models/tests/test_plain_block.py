"""Blocks of plain parts are run without their modules, to the bit as with them; what somebody changed is called."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from layer_pairs import images
from small_models import SMALL, Build, scatter_routing
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.func import functional_call

from dge_models import encoder, from_timm, set_fixed_queries
from dge_models.plain_block import PlainParts, run_plain

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"qkv_bias": False},
    "norms of heads": {"qk_norm": True},
    "norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.5},
    "dropout": {"drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    "another activation": {"act_layer": nn.SiLU},
    "another MLP": {"mlp_layer": SwiGLU},
}
PARTS = ["norm1", "attn.qkv", "attn.q_norm", "attn.norm", "attn.proj_drop", "ls1", "drop_path1", "mlp", "mlp.act"]
PARTS += ["mlp.drop1", "mlp.fc2", "ls2", "router.gate"]


class _Watch:
    """Which blocks were run in one go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain: list[bool] = []
        monkeypatch.setattr(encoder, "run_plain", self._run)

    def _run(self, *arguments: Any) -> Tensor | None:
        out = run_plain(*arguments)
        self.plain.append(out is not None)
        return out


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> _Watch:
    return _Watch(monkeypatch)


def _routed(**form: Any) -> Any:
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", **{**SMALL, **form})
    return scatter_routing(from_timm(dense)).eval()


def _with_modules(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the model gives where its blocks call their modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "run_plain", lambda *arguments: None)
        out: Tensor = model(pixels)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_modules_to_the_bit(watch: _Watch, form: str) -> None:
    model, pixels = _routed(**FORMS[form]), images("deit")
    with torch.no_grad():
        assert torch.equal(model(pixels), _with_modules(model, pixels))
    assert watch.plain == [True] * 3


def _changed(model: Any, part: str, kind: str, out: list[str]) -> None:
    module = model.blocks[1].get_submodule(part)
    if kind == "hook":
        module.register_forward_hook(lambda *_: out.append(part))
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda *_: out.append(part))
    else:
        forward = module.forward
        module.forward = lambda *arguments: (out.append(part), forward(*arguments))[1]


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_watched_after_a_first_run_is_called(watch: _Watch, part: str, kind: str) -> None:
    model, pixels, called = _routed(), images("deit"), []
    with torch.no_grad():
        expected = model(pixels)
        _changed(model, part, kind, called)
        torch.testing.assert_close(model(pixels), expected)
    assert set(called) == {part}
    assert watch.plain == [True] * 3 + [True, False, True]


def test_replaced_parts_are_found_and_used(watch: _Watch) -> None:
    model, pixels = _routed(), images("deit")
    with torch.no_grad():
        before = model(pixels)
        model.blocks[0].mlp.fc1 = nn.Linear(32, 128)
        model.blocks[1].attn.proj = nn.Sequential(nn.Linear(32, 32))
        model.blocks[2].norm2 = nn.RMSNorm(32)
        after = model(pixels)
        assert torch.equal(after, _with_modules(model, pixels))
    assert (after - before).abs().max() > 1e-3
    assert watch.plain[3:] == [True, False, False]


def test_a_class_that_changes_is_noticed(watch: _Watch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, pixels = _routed(), images("deit")
    with torch.no_grad():
        model(pixels)
        model.blocks[1].mlp.fc2.__class__ = Doubled
        assert torch.equal(model(pixels), _with_modules(model, pixels))
    assert watch.plain[3:] == [True, False, True]


def test_a_dropout_that_trains_alone_drops(watch: _Watch) -> None:
    model, pixels = _routed(proj_drop_rate=0.5), images("deit")
    with torch.no_grad():
        expected = model(pixels)
        model.blocks[1].mlp.drop1.train()
        assert not torch.allclose(model(pixels), expected)
    assert watch.plain[3:] == [True, False, True]


def test_weights_of_other_kinds_go_through_the_modules(watch: _Watch) -> None:
    model, pixels = _routed(), images("deit")
    del model.blocks[1].attn.qkv.weight
    model.blocks[1].attn.qkv.weight = torch.randn(96, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels), _with_modules(model, pixels))
    assert watch.plain == [True, False, True]


def test_weights_are_read_in_every_run(watch: _Watch) -> None:
    model, pixels = _routed(), images("deit")
    with torch.no_grad():
        before = model(pixels)
        scaled = {name: 1.1 * value for name, value in model.state_dict().items()}
        swapped = functional_call(model, scaled, pixels)
        assert torch.equal(model(pixels), before)
        model.load_state_dict(scaled)
        assert torch.equal(model(pixels), swapped)
    assert not torch.equal(before, swapped)
    assert watch.plain == [True] * 12


def _preparations(model: Any, pixels: Tensor) -> dict[str, Any]:
    return {
        "gradients": lambda: torch.enable_grad()(model)(pixels),
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)(model)(pixels),
        "float64": lambda: copy.deepcopy(model).double()(pixels.double()),
        "routing": lambda: model.forward_routed(pixels)[0],
        "fixed": lambda: (set_fixed_queries(model, 0.6), model(pixels))[1],
    }


@pytest.mark.parametrize("setting", ["gradients", "autocast", "float64", "routing", "fixed"])
def test_whatever_needs_preparation_goes_through_the_modules(watch: _Watch, setting: str) -> None:
    model, pixels = _routed(), images("deit")
    with torch.no_grad():
        out = _preparations(model, pixels)[setting]()
    assert out.shape == (2, 7)
    assert not any(watch.plain)


def test_other_blocks_and_wrong_tokens_are_left_to_the_block(small: Build, watch: _Watch) -> None:
    model = _routed()
    with torch.no_grad():
        small("pvt_dge_s124_tiny_256")(images("pvt"))
        assert not watch.plain  # of a subclass
        with pytest.raises(ValueError, match=r"^x must be \[B, 65, C\]"):
            model.blocks[0](torch.zeros(1, 64, 32), (8, 8), 1)
    assert watch.plain == [False]


def test_copies_and_pickles_find_their_own_parts(watch: _Watch) -> None:
    model, pixels = _routed(), images("deit")
    with torch.no_grad():
        expected = model(pixels)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert "_plain" not in vars(other.blocks[0])
            other.blocks[0].norm1.weight.zero_()
            assert not torch.equal(other(pixels), expected)
        assert torch.equal(model(pixels), expected)
    assert isinstance(vars(model.blocks[0])["_plain"], PlainParts)
    assert all(watch.plain)
