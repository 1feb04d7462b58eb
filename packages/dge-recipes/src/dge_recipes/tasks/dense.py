"""What detection and segmentation share: a backbone inside, costs by part, and batches that are lists."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset

from dge_recipes import markdown
from dge_recipes.classes import Classes
from dge_recipes.config import Config, ScenesData
from dge_recipes.data import HeldOutData
from dge_recipes.data.registry import DataConfig
from dge_recipes.data.workers import watched
from dge_recipes.dense import PartMacs
from dge_recipes.errors import UserError
from dge_recipes.evaluation.table import results_table, show_macs
from dge_recipes.tasks.task import TaskEvaluation

__all__ = [
    "Costs",
    "CostsOfImages",
    "DenseEvaluation",
    "DenseTask",
    "check_supported",
    "evaluating",
    "own_batches",
    "spaced_images",
]

_CALIBRATION = 64

Found = TypeVar("Found", bound=TaskEvaluation)


class DenseTask:
    """The parts of :class:`dge_recipes.tasks.Task` that detection and segmentation have in common."""

    curves: tuple[str, ...] = ()
    judges_start = False

    def backbone(self, model: nn.Module) -> nn.Module:
        """The pyramid or the vision transformer inside."""
        return next((part for part in model.modules() if hasattr(part, "set_grad_checkpointing")), model)

    def preparation(
        self, config: Config, model: nn.Module, held_out: HeldOutData, classes: Classes, accelerator: Accelerator
    ) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
        """Batches as they are: nothing is mixed, and nobody asked."""
        return lambda images, targets: (images, targets, None)

    def figures(self, evaluation: Any) -> dict[str, str]:
        """See :class:`dge_recipes.tasks.Task`."""
        raise NotImplementedError

    def table(self, model: str, evaluation: "DenseEvaluation[Any]", speed: float | None, published: Any = None) -> str:
        """The figures, and below the costs of the parts."""
        scores = results_table(model, self.figures(evaluation), evaluation.macs, speed)
        return f"{scores}\n\n{evaluation.costs.table()}"

    def stand_in(self, config: Config, num_images: int) -> tuple[DataConfig, str]:
        """Drawn scenes of the recipe's size."""
        size = config.data.image_size
        data = ScenesData(name="scenes", image_size=size, num_images=num_images, held_out_images=num_images)
        return data, f"drawn scenes of {size} x {size} in {data.num_classes} classes"


def spaced_images(data: Dataset[Any]) -> list[Tensor]:
    """Evenly spaced images float32 [3, H, W] of a set in the form for evaluation, :data:`_CALIBRATION` at most."""
    length = len(data)  # type: ignore[arg-type]  # has __len__
    count = min(_CALIBRATION, length)
    samples = [data[index * length // count] for index in range(count)]
    return [image for image, target in samples if bool(target["readable"])]


def check_supported(config: Config) -> None:
    """What is for classification alone.

    A compiled backbone gives the same losses, but its graph breaks where routings are collected, inside several calls
    each of which is then traced anew: a vision transformer of two blocks took 39 s of CPU time for its first step in
    a segmenter, before any code was generated.

    Raises:
        UserError: the recipe asks for it.
    """
    if config.train.shard:
        raise UserError(f"train.shard=true is for classification; got task={config.task}")
    if config.train.compile is not None:
        raise UserError(
            f"train.compile: got {config.train.compile} with task={config.task}, expected null: the "
            "backbone's graph breaks where its routings are collected, and compiling takes minutes"
        )


@dataclass(frozen=True)
class Costs:
    """Mean multiply-accumulates per image of a network's parts.

    Attributes:
        backbone, static_backbone: as it was routed, and with every query computed.
        neck, head: which do not depend on routing.
    """

    backbone: float
    static_backbone: float
    neck: float
    head: float

    @property
    def ratio(self) -> float:
        """The backbone's MACs over those with every query computed: what ``budget.target`` is about."""
        return self.backbone / self.static_backbone

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "backbone_macs": self.backbone,
            "backbone_static_macs": self.static_backbone,
            "backbone_mac_ratio": self.ratio,
            "neck_macs": self.neck,
            "head_macs": self.head,
        }

    def table(self) -> str:
        """The parts side by side in Markdown, as routed and with every query computed."""
        rows = {"dynamic": self.backbone, "static": self.static_backbone}
        parts = {
            name: (backbone, self.neck, self.head, backbone + self.neck + self.head) for name, backbone in rows.items()
        }
        return markdown.table(
            ("MACs", "backbone", "neck", "head", "together"),
            ((name, *map(show_macs, each)) for name, each in parts.items()),
        )


@dataclass(frozen=True)
class DenseEvaluation(Generic[Found]):
    """What an evaluation found, with the costs of backbone, neck and head apart; see :class:`TaskEvaluation`."""

    found: Found
    costs: Costs

    @property
    def images(self) -> int:
        """Images evaluated."""
        return self.found.images

    @property
    def unreadable(self) -> int:
        """Images that could not be read."""
        return self.found.unreadable

    @property
    def macs(self) -> float:
        """Mean multiply-accumulates per image of the whole network."""
        return self.found.macs

    @property
    def mac_ratio(self) -> float:
        """The same over those of the network with every query computed."""
        return self.found.mac_ratio

    @property
    def score(self) -> float:
        """From 0 to 1."""
        return self.found.score

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.found.as_dict(), **self.costs.as_dict()}


class CostsOfImages:
    """Collects what the parts of a network cost, in each process for its share of the images.

    Args:
        accelerator: of this run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._found: list[tuple[int, float, float, float, float]] = []

    def add(self, targets: Sequence[Mapping[str, Tensor]], macs: PartMacs) -> tuple[Tensor, Tensor]:
        """One batch.

        Args:
            targets: of each image ``image_id`` and ``readable``.
            macs: of the batch.

        Returns:
            MACs of the whole network for each image, float64 [B], and with every query computed.
        """
        for target, backbone in zip(targets, macs.backbone.tolist(), strict=True):
            if bool(target["readable"]):
                self._found.append((int(target["image_id"]), backbone, macs.static_backbone, macs.neck, macs.head))
        beside = macs.neck + macs.head
        return macs.backbone + beside, torch.full_like(macs.backbone, macs.static_backbone + beside)

    def finish(self) -> Costs:
        """Means over the images of all processes, summed in the order of the set. Every process calls it."""
        every = sorted(gather_object(self._found))
        return Costs(*torch.tensor([each[1:] for each in every], dtype=torch.float64).mean(0).tolist())


def own_batches(
    loader: Any, accelerator: Accelerator, held_out: HeldOutData
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """A process's share of the held-out set, without the images that Accelerate repeats to make batches even.

    What is left are the batches that one process alone would see: sums of floating-point numbers depend a little on how
    many images are run together, and evaluations must not depend on the number of processes. So a batch may be empty;
    there are equally many in every process.

    Args:
        loader: of the held-out set in its order, as prepared; yields lists of images and of targets.
        accelerator: of this run.
        held_out: the set.
    """
    batch_size = held_out.loader.batch_size or 1
    for number, (images, targets) in enumerate(watched(loader)):
        batch, own = number * accelerator.num_processes + accelerator.process_index, dict[int, int]()
        for place, target in enumerate(targets):
            image_id = int(target["image_id"])
            if image_id // batch_size == batch:
                own.setdefault(image_id, place)
        yield [images[place] for place in own.values()], [targets[place] for place in own.values()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)
