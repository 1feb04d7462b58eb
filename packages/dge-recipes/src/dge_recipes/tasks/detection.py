"""Detection: boxes, and with Mask R-CNN masks, of the objects in an image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData, build_detection_data, build_detection_held_out
from dge_recipes.dense import DetectionLosses, build_detector, create_backbone, forward_counted
from dge_recipes.evaluation.detection import DetectionEvaluation, DetectionResults
from dge_recipes.tasks.dense import (
    CostsOfImages,
    DenseEvaluation,
    DenseTask,
    check_supported,
    evaluating,
    own_batches,
    spaced_images,
)

__all__ = ["Detection"]


class Detection(DenseTask):
    """See :class:`dge_recipes.tasks.Task`. Batches are a list of images float32 [3, H, W] and one of their targets.

    Args:
        masks: masks are learnt too.
    """

    score_label = "AP"

    def __init__(self, *, masks: bool) -> None:
        self.masks = masks
        self.score_name = "mask_ap" if masks else "ap"

    def build_data(self, config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
        """See :func:`dge_recipes.data.build_detection_data`."""
        return build_detection_data(config, num_processes, masks=self.masks)

    def build_held_out(self, config: Config, classes: Classes | None, known: str) -> HeldOutData:
        """See :func:`dge_recipes.data.build_detection_held_out`."""
        return build_detection_held_out(config, classes, known, masks=self.masks)

    def build_model(
        self,
        config: Config,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        init: bool = True,
        classes: Classes | None = None,
    ) -> nn.Module:
        """A detector of torchvision on the recipe's backbone; ``model.init_from`` starts the backbone."""
        check_supported(config)
        backbone = create_backbone(config.model, init=init)
        return build_detector(backbone, config.head, num_classes, image_shape[-1]).train()

    def build_losses(self, config: Config, model: nn.Module) -> DetectionLosses:
        """torchvision's losses, and the budget."""
        return DetectionLosses(model, str(config.head.kind), config.budget, config.train.seed)

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        accelerator: Accelerator,
        held_out: HeldOutData,
        after_batch: Callable[[], None] = lambda: None,
    ) -> DenseEvaluation[DetectionEvaluation]:
        """Average precision over the held-out images; the same on any number of processes."""
        results, costs = DetectionResults(masks=self.masks), CostsOfImages(accelerator)
        with evaluating(model):
            for images, targets in own_batches(loader, accelerator, held_out):
                if images:
                    with accelerator.autocast():
                        predictions, macs = forward_counted(model, images)
                    results.add(predictions, targets, *costs.add(targets, macs))
                after_batch()
        found = results.finish(accelerator, held_out.num_images, held_out.loader.dataset)
        return DenseEvaluation(found, costs.finish())

    def figures(self, evaluation: DenseEvaluation[DetectionEvaluation]) -> dict[str, str]:
        """Average precisions from 0 to 1, and the backbone's MAC ratio."""
        scores, shown = evaluation.found.as_dict(), {}
        for prefix, kind in (("mask_", "mask "), ("", "")) if self.masks else (("", ""),):
            for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"):
                value = scores.get(prefix + name)
                size = {"ap_small": "AP S", "ap_medium": "AP M", "ap_large": "AP L"}.get(name, name.upper())
                shown[kind + size] = "-" if value is None else f"{value:.3f}"
        return {**shown, "backbone MACs": f"{evaluation.costs.ratio:.3f}"}

    def calibration_batches(self, config: Config, model: nn.Module) -> list[Tensor]:
        """Resized and padded as the detector does it."""
        images = spaced_images(config.data.detection_images("train", None, Path(config.output.dir)).images)
        detector, size = model, config.eval.batch_size
        groups = [images[start : start + size] for start in range(0, len(images), size)]
        return [detector.transform(group)[0].tensors for group in groups]  # type: ignore[operator]

    def first_images(self, data_set: Dataset[Any], count: int) -> list[Tensor]:
        """Images float32 [3, H, W] in their own sizes."""
        return [data_set[index][0] for index in range(min(count, len(data_set)))]  # type: ignore[arg-type]  # has __len__
