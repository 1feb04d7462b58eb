"""Routers that are fitted to a pretrained model before the first step, and those that stay so in training."""

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import dge_models
from dge_models import BudgetTerm, Router, Routing
from dge_recipes.compress.crops import read_crops, with_crops
from dge_recipes.config import Config, ImageData
from dge_recipes.data.image_sets import plain_images
from dge_recipes.data.images import HeldOutImages
from dge_recipes.errors import UserError
from dge_recipes.processes import on_main_process
from dge_recipes.randomness import derive_seed

__all__ = ["FittedRouters", "KeptRouters"]

T = TypeVar("T")


class KeptRouters(BudgetTerm):
    """The term of ``budget.kind=set``: no penalty, as routers do not learn; it knows how they were fitted.

    Args:
        target: MAC ratio to meet.
    """

    def __init__(self, target: float) -> None:
        super().__init__(target)
        self.target = target
        self._biases: list[list[float]] = []

    def remember(self, model: nn.Module) -> None:
        """Take the biases that a model's routers have now for those to shift from."""
        self._biases = [router.gate.bias.tolist() for router in _routers(model)]

    def restore(self, model: nn.Module) -> None:
        """Give a model's routers the biases that were remembered."""
        _write(model, self._biases)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds."""
        return {"biases": [list(each) for each in self._biases]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self._biases = [list(map(float, each)) for each in state["biases"]]

    def forward(self, model: nn.Module, routings: Sequence[Routing]) -> Tensor:
        """0, float32 []."""
        return dge_models.mac_ratio(model, routings).detach() * 0


class FittedRouters:
    """Fits and shifts the routers of a run's models, on training pictures that nothing else is done to.

    The main process computes, and all others get its numbers: they are equal, bit for bit, whatever the devices.

    Args:
        config: the run's.
        accelerator: of the run.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator

    def fit(self, model: nn.Module) -> None:
        """Fit routers in closed form at ``budget.target``, see :func:`dge_models.fit_routers`. Every process calls it.

        Args:
            model: with routed blocks, on the device; its routers change.

        Raises:
            UserError: the target is out of reach, or no picture can be read.
        """
        seed, target = self._config.train.seed, self._config.budget.target

        def fit() -> list[tuple[Tensor, Tensor]]:
            pictures = self._pictures
            _told(
                lambda: dge_models.fit_routers(
                    model, self._filled(pictures), target, calibration=pictures, seed=derive_seed(seed, "routers")
                ),
                target,
            )
            return [(router.gate.weight.detach().cpu(), router.gate.bias.detach().cpu()) for router in _routers(model)]

        fitted = on_main_process(self._accelerator, fit)
        with torch.no_grad():
            for router, (weight, bias) in zip(_routers(model), fitted, strict=True):
                router.gate.weight.copy_(weight)
                router.gate.bias.copy_(bias)

    def settle(self, model: nn.Module, kept: KeptRouters) -> None:
        """Shift routers so that a model that has learnt meets ``budget.target`` again. Every process calls it.

        The shift is looked for from the fitted biases on, so it follows from the weights and the pictures alone: a run
        that is stopped in an evaluation and begins it again gets the same.

        Args:
            model: with routed blocks, on the device; the biases of its routers change.
            kept: what is known of its routers.

        Raises:
            UserError: no shift meets the target.
        """

        def find() -> list[list[float]]:
            kept.restore(model)
            _told(lambda: dge_models.set_budget(model, kept.target, self._pictures), kept.target)
            return [router.gate.bias.tolist() for router in _routers(model)]

        _write(model, on_main_process(self._accelerator, find))

    @cached_property
    def _pictures(self) -> list[Tensor]:
        """Training pictures, evenly spaced, resized and cropped as held-out ones: batches [B, C, H, W] on the device.

        Those that cannot be read are left out here, and dealt with when training meets them.
        """
        wanted = self._config.student.pictures
        with tempfile.TemporaryDirectory(prefix="dge-train-") as scratch:
            config = self._config.model_copy(update={"output": self._config.output.model_copy(update={"dir": scratch})})
            images = plain_images(config, "train", counted=False).images
            count = min(wanted, len(images))
            found = [_read(images, place * len(images) // count) for place in range(count)]
        readable = [each for each in found if each is not None]
        if not readable:
            raise UserError(f"none of the {count} training pictures that routers are fitted on can be read")
        batches = torch.stack(readable).to(self._accelerator.device).split(self._config.eval.batch_size)
        return list(batches)

    def _filled(self, pictures: list[Tensor]) -> list[Tensor]:
        """With crops of the pictures where there are fewer than wanted."""
        data, wanted = self._config.data, self._config.student.pictures
        if sum(map(len, pictures)) >= wanted or not isinstance(data, ImageData):
            return pictures
        crops = read_crops(data.open("train"), data, derive_seed(self._config.train.seed, "crops"))
        return with_crops(pictures, crops, wanted)


def _read(images: Any, index: int) -> Tensor | None:
    if not isinstance(images, HeldOutImages):
        image: Tensor = images[index][0]
        return image
    picture = images.picture(index)
    return None if picture is None else images.transformed(picture, index)


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _write(model: nn.Module, biases: Sequence[Sequence[float]]) -> None:
    with torch.no_grad():
        for router, bias in zip(_routers(model), biases, strict=True):
            router.gate.bias.copy_(torch.tensor(bias))


def _told(action: Callable[[], T], target: float) -> T:
    """What an action returns; what it cannot do is the user's to change."""
    try:
        return action()
    except ValueError as error:
        raise UserError(
            f"budget.target={target}: routers cannot be set to it: {' '.join(str(error).split())}"
        ) from error
