"""The two models that a benchmark compares."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import dge_models
from dge_models import Router
from dge_recipes.config import ModelConfig
from dge_recipes.errors import UserError
from dge_recipes.models import create_model, is_routed, load_weights

__all__ = ["Pair", "build_pair"]


@dataclass(frozen=True)
class Pair:
    """A dense model and the DGE model of the same shape, on one device, in evaluation mode.

    Attributes:
        models: ``dense`` and ``DGE``.
        images: makes a batch of noise of the given size.
        mac_ratio: mean MACs of the DGE model over the dense one's, on such images.
        routing: where the routing comes from, for the report.
    """

    models: dict[str, nn.Module]
    images: Callable[[int], Tensor]
    mac_ratio: float
    routing: str


def build_pair(dge: str, dense: str, checkpoint: str | None, ratio: float | None, device: torch.device) -> Pair:
    """Build both models.

    Args:
        dge: the DGE model's name known to timm.
        dense: the dense model's.
        checkpoint: weights of the DGE model, a head of another size left out; None: random weights, the routers
            set to `ratio`.
        ratio: MAC ratio to set the routers to; None: as the checkpoint has them, or 0.5 without one.
        device: to run on.

    Raises:
        UserError: an unknown model, one without routers, weights that do not fit, a ratio out of reach, or a dense
            model that is no vision transformer or takes other images.
    """
    torch.manual_seed(0)
    routed = create_model(ModelConfig(name=dge), 1000)
    if not is_routed(routed):
        raise UserError(f"--model {dge} has no routers; expected a DGE model, and --dense for the one to compare with")
    routing = f"as {checkpoint} has it"
    if checkpoint is not None:
        load_weights(routed, checkpoint, reset_head=True)
    else:
        ratio = 0.5 if ratio is None else ratio
        for module in routed.modules():
            if isinstance(module, Router):  # as initialised a router can hardly tell regions apart
                nn.init.normal_(module.gate.weight)
    size = timm.get_pretrained_cfg(dge).input_size  # type: ignore[union-attr]
    plain = create_model(ModelConfig(name=dense), 1000)
    models = {"dense": plain.to(device).eval(), "DGE": routed.to(device).eval()}

    def images(batch: int) -> Tensor:
        return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch)).to(device)

    calibration = [images(4), images(5)]
    try:
        with torch.inference_mode():
            plain(calibration[0][:1])
        static = dge_models.count_macs(plain, calibration[0]).total.mean().item()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--dense {dense} cannot be compared on images of {list(size)}: {error}") from error
    if ratio is not None:
        try:
            setting = dge_models.set_budget(routed, ratio, calibration)
        except ValueError as error:
            raise UserError(f"--ratio {ratio}: {error}") from error
        source = "random" if checkpoint is None else checkpoint
        routing = f"{source} weights, set to a MAC ratio of {setting.ratio:.3f} on noise"
    dynamic = dge_models.count_macs(routed, calibration[0]).total.mean().item()
    return Pair(models, images, dynamic / static, routing)
