"""PyTorch's distributed wrappers take the models as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from small_models import Build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dge_models import BudgetLoss, deterministic_routing, set_training_mode
from dge_models.routed import routed_blocks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

every_kind = pytest.mark.parametrize(
    "name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256", "dpvt_dge_s124_tiny_256"]
)


def _images(name: str) -> torch.Tensor:
    size = 64 if "pvt" in name else 32
    return torch.randn(2, 3, size, size)


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_ddp_hands_out_routings_and_finds_every_parameter_used(small: Build, name: str, mode: str) -> None:
    model = small(name, training_mode=mode).train()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        logits, routings = wrapped(_images(name), return_routing=True)
        (logits.square().mean() + BudgetLoss()(model, routings)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_fsdp2_shards_block_by_block(small: Build, name: str, mode: str) -> None:
    model, images = small(name).train(), _images(name)
    set_training_mode(model, mode)
    with deterministic_routing():
        expected = model(images)
    mesh = init_device_mesh("cpu", (1,))
    for block in routed_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with deterministic_routing():
        logits, routings = model.forward_routed(images)
    torch.testing.assert_close(logits, expected)
    (logits.square().mean() + routings[0].queries.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert model.eval()(images).shape == logits.shape


# Linear layers return views of tensors of more than two dimensions; nothing here changes them in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .FSDPLinear. returned a view tensor:UserWarning")
@every_kind
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_fsdp2_shards_layer_by_layer(small: Build, name: str, mode: str) -> None:
    """Then a weight is whole only while its layer is called."""
    model, images = small(name).train(), _images(name)
    set_training_mode(model, mode)
    with deterministic_routing():
        expected = model(images)
    mesh = init_device_mesh("cpu", (1,))
    for layer in [module for module in model.modules() if type(module) is nn.Linear]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with deterministic_routing():
        logits, routings = model.forward_routed(images)
    torch.testing.assert_close(logits, expected)
    (logits.square().mean() + routings[0].queries.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert model.eval()(images).shape == logits.shape


def test_an_attention_sharded_as_a_whole_is_refused(small: Build) -> None:
    model = small()
    fully_shard(model.blocks[1].attn, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.attn: got a hook .* never calls its attention as a whole"):
        model(_images("deit"))
