"""Interpolated position embeddings are computed once, and never those of parameters that have changed."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import SMALL, SMALL_PYRAMID, scatter_routing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from dge_models import position_cache
from dge_models.position_cache import MOST_SIZES, remembered

SIZE = (64, 96)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pvt": ("pvt_dge_s124_tiny_256", SMALL_PYRAMID),
    "dpvt": ("dpvt_tiny_256", SMALL_PYRAMID),
    "vit": ("deit_dge_s124_tiny_patch16_256", {**SMALL, "dynamic_img_size": True}),
    "distilled": ("deit_dge_s124_tiny_distilled_patch16_256", {**SMALL, "dynamic_img_size": True}),
    "registers": (
        "deit_dge_s124_tiny_patch16_256",
        {**SMALL, "dynamic_img_size": True, "reg_tokens": 2, "no_embed_class": True},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name][0], **MODELS[name][1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return scatter_routing(model).eval()


def _images(size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


def _anew(model: Any, images: Tensor) -> Tensor:
    """What the model returns where gradients are recorded, and nothing is remembered."""
    with torch.enable_grad():
        result: Tensor = model(images).detach()
    return result


@pytest.fixture
def interpolations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sizes that were interpolated to, as they are."""
    sizes: list[Any] = []
    original = F.interpolate

    def counted(images: Tensor, size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if size is not None:  # else pooled gates
            sizes.append(tuple(size))
        return original(images, size, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", counted)
    return sizes


@every_model
def test_a_size_is_interpolated_once_and_gives_the_same_numbers(name: str, interpolations: list[Any]) -> None:
    model, images = _model(name), _images()
    expected = _anew(model, images)
    stages = 4 if "pvt" in name else 1
    assert len(interpolations) == stages
    with torch.no_grad():
        assert torch.equal(model(images), expected)
        assert len(interpolations) == 2 * stages
        for _ in range(2):
            assert torch.equal(model(images), expected)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    assert len(interpolations) == 2 * stages
    model.train()
    with torch.no_grad():
        model(images)
    assert len(interpolations) == (2 if "pvt" in name else 3) * stages


def _step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(_images()).square().sum().backward()
    optimizer.step()


def _changed(model: Any) -> dict[str, Tensor]:
    return {key: value + 0.5 for key, value in model.state_dict().items()}


class _LowRank(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.ones_like(weight[..., :1]) @ torch.ones_like(weight[:, :1])


def _parametrised(model: Any) -> None:
    for part in list(model.modules()):
        if isinstance(getattr(part, "pos_embed", None), nn.Parameter):
            parametrize.register_parametrization(part, "pos_embed", _LowRank())


def _through_data(model: Any) -> None:
    for key, parameter in model.named_parameters():
        if "pos_embed" in key or "token" in key:
            parameter.data.mul_(1.5)


def _quantised(model: Any) -> None:
    """Linear layers dynamically, position embeddings and tokens to eight bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor.* are deprecated", UserWarning)
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    for key, parameter in model.named_parameters():
        if "pos_embed" in key:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()


CHANGES: dict[str, Callable[[Any], object]] = {
    "load_state_dict": lambda model: model.load_state_dict(_changed(model)),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(_changed(model), assign=True),
    "half and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
    "optimizer step": _step,
    "LoRA as a parametrisation": _parametrised,
    "merged through .data": _through_data,
    "quantised": _quantised,
    "set_input_size": lambda model: model.set_input_size((48, 80)),
}


@every_model
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_interpolated_anew(name: str, change: str) -> None:
    model = _model(name)
    with torch.no_grad():
        before = model(_images())
    CHANGES[change](model)
    images = _images().to(next(model.parameters()).dtype)
    with torch.no_grad():
        after = model(images)
    assert torch.equal(after, _anew(model, images))
    assert not torch.equal(after.float(), before)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_parameters_that_fsdp_gathers_into_the_same_memory() -> None:
    model, images = _model("pvt"), _images()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    results = []
    for _ in range(3):
        with torch.no_grad():
            results.append(model(images))
            assert torch.equal(results[-1], _anew(model, images))
        model(images).square().mean().backward()
        optimizer.step()
    assert not torch.equal(results[0], results[1])


@every_model
def test_the_embedding_learns_in_evaluation_mode(name: str) -> None:
    model = _model(name)
    with torch.no_grad():
        model(_images())
    model(_images()).square().sum().backward()
    embedding = model.stages[0].pos_embed if "pvt" in name else model.pos_embed
    assert embedding.grad is not None and embedding.grad.any()


def test_it_is_bounded_and_what_is_used_stays() -> None:
    parameter, computed = nn.Parameter(torch.zeros(3)), []

    def result(key: int, count: int = 1) -> Tensor:
        return remembered([parameter], key, lambda: (computed.append(key), torch.full((count,), float(key)))[1])

    with torch.no_grad():
        for key in range(MOST_SIZES + 1):
            result(key)
            result(0)
        assert computed == list(range(MOST_SIZES + 1))
        result(1)
        assert computed.pop() == 1  # the one used longest ago had gone
        result(0)
        assert len(computed) == MOST_SIZES + 1
        assert len(position_cache._known[parameter].results) == MOST_SIZES
        result(99, position_cache.MOST_BYTES)  # larger alone than all may be
        assert list(position_cache._known[parameter].results) == [99]
        assert result(99, position_cache.MOST_BYTES)[0] == 99


@every_model
def test_copies_and_files_know_nothing_of_it(name: str) -> None:
    model, images = _model(name), _images()
    names, stored = set(model.state_dict()), len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(images)
        assert set(model.state_dict()) == names
        assert len(pickle.dumps(model)) == stored
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
            _through_data(other)
            assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected)


def test_it_goes_with_the_model() -> None:
    gc.collect()
    before = len(position_cache._known)
    model = _model("pvt")
    with torch.no_grad():
        model(_images())
    assert len(position_cache._known) == before + 4
    del model
    gc.collect()
    assert len(position_cache._known) == before


@pytest.mark.parametrize("name", ["dpvt", "vit"])
def test_compiled_and_exported_code_computes_it(name: str) -> None:
    torch.compiler.reset()
    model, images = _model(name), _images()
    with torch.no_grad():
        model(images)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images), model(images))
        _through_data(model)
        torch.testing.assert_close(compiled(images), _anew(model, images))
        if name == "dpvt":
            exported = torch.export.export(model, (images,)).module()
            _through_data(model)
            torch.testing.assert_close(exported(images), _anew(model, images))
    torch.compiler.reset()


def test_fake_tensors_are_not_remembered() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = remembered([parameter], "size", lambda: parameter * 2)
        real = remembered([parameter], "size", lambda: parameter * 2)
    assert type(fake) is not Tensor
    assert real.tolist() == [2, 2]


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + remembered([self.weight], "size", lambda: self.weight * 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_computes_it() -> None:
    module, x = _Doubled(), torch.zeros(2)
    with torch.no_grad():
        module(x)
        traced = torch.jit.trace(module, (x,))
        module.weight.data.fill_(3)
        assert traced(x).tolist() == [6, 6]
