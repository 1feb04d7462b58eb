"""Sharding a run over its processes: PyTorch's ``fully_shard``, known as FSDP2, on any device.

It is applied here and not by Accelerate, which does without it, and does not say so, where there are only CPUs.
"""

import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dge_recipes.config import Config
from dge_recipes.errors import UserError
from dge_recipes.models import build_model, is_routed

__all__ = ["adopt_launcher", "check_sharding", "local_part", "shard", "whole_model"]

_ASKED = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "parameters stay on the device",
    "FSDP_ACTIVATION_CHECKPOINTING": "use train.checkpoint_activations=true",
}


def adopt_launcher(config: Config) -> Config:
    """The recipe with ``train.shard`` where ``accelerate launch --use_fsdp --fsdp_version 2`` started the processes.

    Raises:
        UserError: the launcher asks for the first version of FSDP, or for something of it that is not there.
    """
    if os.environ.get(_ASKED) != "true":
        return config
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"the launcher asks for FSDP version {version}; expected --fsdp_version 2")
    for name, instead in _REFUSED.items():
        if os.environ.get(name) == "true":
            raise UserError(f"the launcher sets {name}=true, which is not supported: {instead}")
    os.environ[_ASKED] = "false"  # else Accelerate would shard once more
    return config.model_copy(update={"train": config.train.model_copy(update={"shard": True})})


def check_sharding(config: Config, accelerator: Accelerator) -> None:
    """Sharding needs a process group, and what it does not go together with is told before anything is built.

    Raises:
        UserError: one process, fp16, or a compiled network.
    """
    if accelerator.num_processes < 2:
        raise UserError("train.shard=true needs several processes; got 1: see the README on launchers")
    if accelerator.scaler is not None:
        raise UserError("train.shard=true is not for fp16, whose loss scaler is proved with DDP only; use bf16")
    if config.train.compile is not None:
        raise UserError(f"train.shard=true does not go with train.compile={config.train.compile}; leave it null")


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Leave each process its part of every parameter, in place; blocks are gathered one at a time when they run.

    Args:
        network: on the device. Its parameters become other objects, so the optimiser has to be built afterwards.
        accelerator: of the processes; every one calls this.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if is_routed(network):
        register_fsdp_forward_method(network, "forward_routed")  # the other way into the network


def whole_model(config: Config, network: nn.Module, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network as every process has it without sharding. Every process calls it.

    Args:
        config: the recipe that it was built from.
        network: sharded, or not.
        input_shape: (channels, height, width).
        num_classes: outputs of the head.

    Returns:
        The network itself if it is not sharded; else a copy on the same device.
    """
    if not isinstance(network, FSDPModule):
        return network
    device = next(network.parameters()).device
    weights: dict[str, Any] = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    copy = build_model(config.model, num_classes, input_shape, init=False)
    copy.load_state_dict(weights)
    return copy.to(device)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: its shard, or all of it."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered as one: the blocks of a transformer, of a pyramid those of every stage."""
    for name, module in network.named_modules():
        if name.split(".")[-1] == "blocks" and isinstance(module, nn.Sequential | nn.ModuleList):
            yield from module
