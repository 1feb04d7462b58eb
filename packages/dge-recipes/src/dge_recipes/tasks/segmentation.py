"""Semantic segmentation: a class for every pixel."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data import HeldOutData, TrainingData, build_segmentation_data, build_segmentation_held_out
from dge_recipes.dense import PartMacs, SegmentationLosses, build_segmenter, create_backbone, forward_counted, likeliest
from dge_recipes.evaluation.segmentation import SegmentationEvaluation, SegmentationResults
from dge_recipes.tasks.dense import (
    CostsOfImages,
    DenseEvaluation,
    DenseTask,
    check_supported,
    evaluating,
    own_batches,
    spaced_images,
)

__all__ = ["Segmentation"]


class Segmentation(DenseTask):
    """See :class:`dge_recipes.tasks.Task`.

    Training batches are images float32 [B, 3, S, S] and masks int64 [B, S, S]; held-out ones a list of images
    float32 [3, h, w], and one of targets with masks in the files' own sizes.
    """

    score_name, score_label = "miou", "mIoU"

    def build_data(self, config: Config, num_processes: int) -> tuple[TrainingData, HeldOutData]:
        """See :func:`dge_recipes.data.build_segmentation_data`."""
        return build_segmentation_data(config, num_processes)

    def build_held_out(self, config: Config, classes: Classes | None, known: str) -> HeldOutData:
        """See :func:`dge_recipes.data.build_segmentation_held_out`."""
        return build_segmentation_held_out(config, classes, known)

    def build_model(
        self,
        config: Config,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        init: bool = True,
        classes: Classes | None = None,
    ) -> nn.Module:
        """A segmenter of segmentation_models_pytorch on the recipe's backbone, which ``model.init_from`` starts."""
        check_supported(config)
        return build_segmenter(create_backbone(config.model, init=init), config.head, num_classes).train()

    def build_losses(self, config: Config, model: nn.Module) -> SegmentationLosses:
        """Cross-entropy over the pixels that are not ignored, and the budget."""
        return SegmentationLosses(model, config.budget, config.train.seed)

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        accelerator: Accelerator,
        held_out: HeldOutData,
        after_batch: Callable[[], None] = lambda: None,
    ) -> DenseEvaluation[SegmentationEvaluation]:
        """Mean intersection over union over the held-out images; the same on any number of processes."""
        results, costs = SegmentationResults(held_out.num_classes), CostsOfImages(accelerator)
        with evaluating(model):
            for images, targets in own_batches(loader, accelerator, held_out):
                for some, logits, macs in _forwards(model, images, accelerator):
                    own = [targets[place] for place in some]
                    sizes = (target["mask"].shape for target in own)
                    masks = [likeliest(each, size) for each, size in zip(logits, sizes, strict=True)]
                    results.add(masks, own, *costs.add(own, macs))
                after_batch()
        found = results.finish(accelerator, held_out.num_images, held_out.loader.dataset)
        return DenseEvaluation(found, costs.finish())

    def figures(self, evaluation: DenseEvaluation[SegmentationEvaluation]) -> dict[str, str]:
        """Means from 0 to 1, and the backbone's MAC ratio."""
        found = evaluation.found
        ratio = f"{evaluation.costs.ratio:.3f}"
        return {"mIoU": f"{found.miou:.4f}", "pixel accuracy": f"{found.pixel_accuracy:.4f}", "backbone MACs": ratio}

    def calibration_batches(self, config: Config, model: nn.Module) -> list[Tensor]:
        """One image each, padded as the segmenter does it."""
        images = spaced_images(config.data.segmentation_images("train", None, Path(config.output.dir)).images)
        multiple = int(model.multiple)  # type: ignore[arg-type]
        sizes = [image.shape[-2:] for image in images]
        rests = [(0, -width % multiple, 0, -height % multiple) for height, width in sizes]
        return [F.pad(image, rest).unsqueeze(0) for image, rest in zip(images, rests, strict=True)]

    def first_images(self, data_set: Dataset[Any], count: int) -> Tensor:
        """Those of the first images that are as large as the very first: float32 [<= count, 3, h, w]."""
        images = [data_set[index][0] for index in range(min(count, len(data_set)))]  # type: ignore[arg-type]  # has __len__
        return torch.stack([image for image in images if image.shape == images[0].shape])


def _forwards(
    model: nn.Module, images: Sequence[Tensor], accelerator: Accelerator
) -> Iterator[tuple[Sequence[int], Tensor, PartMacs]]:
    """Places of images of one size, their logits [n, classes, h, w] and costs; one size after the other."""
    sizes: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(place)
    for some in sizes.values():
        with accelerator.autocast():
            logits, macs = forward_counted(model, torch.stack([images[place] for place in some]))
        yield some, logits, macs
