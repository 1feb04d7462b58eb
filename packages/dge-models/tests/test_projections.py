from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dge_models.projections import copied, is_plain, linear_shape, linear_shapes, placement, project


@pytest.mark.parametrize("bias", [True, False])
def test_some_outputs_are_those_of_the_whole_layer(bias: bool) -> None:
    layer, x = nn.Linear(6, 9, bias=bias), torch.randn(2, 5, 6)
    called = copy.deepcopy(layer)
    called.register_forward_hook(lambda module, args, out: None)
    for rows in (slice(None, 3), slice(3, None), slice(None)):
        torch.testing.assert_close(project(layer, x, rows), layer(x)[..., rows])
        torch.testing.assert_close(project(called, x, rows), layer(x)[..., rows])


class _Subclass(nn.Linear):
    pass


class _Quantised(torch.Tensor):
    """Stands for the tensors of quantisation libraries, and for sharded ones."""


def _with_weight(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _with_forward() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def test_plain_is_what_nothing_has_changed() -> None:
    layer = nn.Linear(4, 4)
    assert is_plain(layer)
    assert is_plain(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    assert is_plain(layer.requires_grad_(False))
    handle = layer.register_full_backward_pre_hook(lambda *args: None)
    assert not is_plain(layer)
    handle.remove()
    assert is_plain(layer)
    prune.l1_unstructured(layer, "bias", 1)
    assert not is_plain(layer)
    assert is_plain(prune.remove(layer, "bias"))
    assert not is_plain(parametrizations.weight_norm(nn.Linear(4, 4)))
    assert not is_plain(_Subclass(4, 4))
    assert not is_plain(_with_forward())
    assert not is_plain(nn.Identity())
    assert not is_plain(_with_weight(torch.randn(4, 4).as_subclass(_Quantised)))


def test_weights_that_a_call_is_made_with_are_plain() -> None:
    layer, seen = nn.Linear(4, 4), []

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(is_plain(self.layer))
            return project(self.layer, x, slice(None, 2))

    around = Around()
    weights = {name: value.detach() for name, value in around.named_parameters()}
    torch.func.functional_call(around, weights, (torch.randn(2, 4),))
    torch.func.grad(lambda w: torch.func.functional_call(around, w, (torch.randn(2, 4),)).sum())(weights)
    assert seen == [True, True]


def test_the_shape_of_a_layer_is_that_of_what_it_wraps() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 5)
            self.down = nn.Linear(3, 1)

    assert linear_shape(nn.Linear(3, 5)) == linear_shape(Around()) == (3, 5)
    assert linear_shape(None) is linear_shape(nn.Identity()) is linear_shape(nn.Sequential(nn.Linear(3, 5))) is None
    mlp = nn.ModuleDict({"fc1": nn.Linear(3, 5), "act": nn.GELU(), "fc2": nn.Sequential(nn.Linear(5, 3))})
    assert list(linear_shapes(mlp)) == [(3, 5), (5, 3)]


def test_where_a_module_computes() -> None:
    assert placement(nn.Linear(2, 2, dtype=torch.float64)) == (torch.device("cpu"), torch.float64)
    assert placement(nn.Identity()) == (torch.device("cpu"), torch.float32)
    offloaded = nn.Linear(2, 2, device="meta")
    assert placement(offloaded)[0] == torch.device("meta")
    offloaded.register_forward_pre_hook(lambda *args: None)
    assert placement(offloaded)[0] == torch.device("cpu")


def test_a_pruned_module_is_copied_and_prunes_its_own_weight() -> None:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 8)
    twin, x = copied(layer), torch.randn(2, 4)
    torch.testing.assert_close(twin(x), layer(x))
    with torch.no_grad():
        twin.weight_orig.mul_(2)
        twin.bias.mul_(2)
    torch.testing.assert_close(twin(x), 2 * layer(x))
