"""Classification: an image has one label."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.config import Config, RandomData
from dge_recipes.data import HeldOutData, TrainingData, build_data, build_held_out
from dge_recipes.data.registry import DataConfig
from dge_recipes.engine.distillation import Teacher, build_teacher, use_both_heads
from dge_recipes.engine.losses import LossModule, build_mixing
from dge_recipes.evaluation.accuracy import Evaluation, evaluate
from dge_recipes.evaluation.speed import first_images
from dge_recipes.evaluation.table import Published, Row, markdown_table
from dge_recipes.evaluation.tradeoff import calibration_batches
from dge_recipes.models import build_model

__all__ = ["Classification"]

_CLASSES = 1000


class Classification:
    """See :class:`dge_recipes.tasks.Task`. Batches are images float32 [B, C, H, W] and labels int64 [B]."""

    score_name, score_label = "acc1", "Acc@1 (%)"
    curves: tuple[str, ...] = ()
    judges_start = False

    def build_data(self, config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
        """See :func:`dge_recipes.data.build_data`."""
        return build_data(config, num_processes)

    def build_held_out(self, config: Config, classes: Classes | None, known: str) -> HeldOutData:
        """See :func:`dge_recipes.data.build_held_out`."""
        return build_held_out(config, classes, known)

    def build_model(
        self,
        config: Config,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        init: bool = True,
        classes: Classes | None = None,
    ) -> nn.Module:
        """See :func:`dge_recipes.models.build_model`; ``data.classes=new`` leaves out the head of other weights."""
        new_head = config.data.classes == "new"
        return build_model(config.model, num_classes, image_shape, init=init, classes=classes, new_head=new_head)

    def backbone(self, model: nn.Module) -> nn.Module:
        """All of it."""
        return model

    def build_losses(self, config: Config, model: nn.Module) -> LossModule:
        """Cross-entropy, distillation and budget."""
        return LossModule(model, config)

    def preparation(
        self, config: Config, model: nn.Module, held_out: HeldOutData, classes: Classes, accelerator: Accelerator
    ) -> "MixedAndTaught":
        """Mixing and a teacher's answers, where the recipe has them."""
        mixing = build_mixing(config, held_out.num_classes)
        teacher = build_teacher(config, classes.count, held_out.image_shape, classes)
        use_both_heads(model, teacher is not None)
        return MixedAndTaught(mixing, teacher, accelerator)

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        accelerator: Accelerator,
        held_out: HeldOutData,
        after_batch: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """See :func:`dge_recipes.evaluation.evaluate`."""
        return evaluate(model, loader, accelerator, held_out.num_images, after_batch, held_out.match)

    def figures(self, evaluation: Evaluation) -> dict[str, str]:
        """Accuracies in percent."""
        return {"Acc@1": f"{evaluation.acc1:.2f}", "Acc@5": f"{evaluation.acc5:.2f}"}

    def table(self, model: str, evaluation: Evaluation, speed: float | None, published: Published | None = None) -> str:
        """A row like the published table's."""
        return markdown_table([Row(model, evaluation.acc1, evaluation.acc5, evaluation.macs, speed, published)])

    def first_images(self, data_set: Dataset[Any], count: int) -> Tensor:
        """Float32 [<= count, C, H, W]."""
        return first_images(data_set, count)

    def calibration_batches(self, config: Config, model: nn.Module) -> list[Tensor]:
        """See :func:`dge_recipes.evaluation.tradeoff.calibration_batches`."""
        return calibration_batches(config)

    def stand_in(self, config: Config, num_images: int) -> tuple[DataConfig, str]:
        """Noise of the recipe's size and number of classes."""
        size, classes = config.data.image_size, getattr(config.data, "num_classes", None) or _CLASSES
        data = RandomData(name="random", image_size=size, num_classes=classes, num_images=num_images)
        return data, f"random images of {size} x {size} in {classes} classes"


class MixedAndTaught:
    """Mixes a batch and asks the teacher what it thinks of it.

    Args:
        mixing: timm's, or None.
        teacher: whose answers are learnt from too, or None.
        accelerator: of the run.
    """

    def __init__(self, mixing: Mixup | None, teacher: Teacher | None, accelerator: Accelerator) -> None:
        self._mixing, self._accelerator = mixing, accelerator
        self._teacher = None if teacher is None else teacher.to(accelerator.device)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images [B, C, H, W]; labels int64 [B] or class probabilities [B, classes]; answers [B, classes] or None."""
        if self._mixing is not None:
            images, labels = self._mixing(images, labels)
        if self._teacher is None:
            return images, labels, None
        with self._accelerator.autocast():
            return images, labels, self._teacher(images)
