"""What a detector or a segmenter finds in images, and beside it where it spends its queries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

import dge_models
from dge_models import RoutedModel, Router, Routing
from dge_recipes.checkpoints.stored_classes import stored_classes
from dge_recipes.classes import Classes
from dge_recipes.config import Config
from dge_recipes.data.decoding import decode, in_one_line, naming
from dge_recipes.data.pixels import as_seen
from dge_recipes.dense import PartMacs, Segmenter, forward_counted, likeliest
from dge_recipes.errors import UserError
from dge_recipes.evaluation.target import Target
from dge_recipes.models import load_weights, routed_part
from dge_recipes.overlays import dense_overlay
from dge_recipes.tasks import task_of
from dge_recipes.visualize import Overlay

__all__ = ["draw_found"]

_LIKELY = 0.5  # objects below this score are neither drawn nor counted
_LONGEST = 4  # long side over short side that a segmenter's images are resized to, at most


def draw_found(
    target: Target, paths: Sequence[Path], *, ema: bool = False, layers: Sequence[int] | None = None
) -> list[Overlay]:
    """Draw boxes and masks, or the class of every pixel, and the mean queries per token beside them.

    Args:
        target: the model, its weights and the recipe whose evaluation the images are prepared as.
        paths: image files.
        ema: the averaged weights.
        layers: indices, from 0, of the routed layers that the mean is over; None: all.

    Raises:
        UserError: weights that are not there, do not fit or do not know their classes, a layer that does not exist, or
            a file that is no image.
    """
    config, weights = target.config, target.find_weights(ema=ema)
    if weights is None:
        raise UserError(f"{config.model.name} holds no trained weights of task={config.task}")
    # Weights whose classes have no names do not say how many there are; the recipe of such data does.
    count: int | None = getattr(config.data, "num_classes", None)
    classes = stored_classes(weights[0]) or (None if count is None else Classes(count))
    if classes is None:
        raise UserError(f"{target.weights} does not say its classes; expected data.num_classes in the recipe")
    size = config.data.image_size
    model = task_of(config).build_model(config, classes.count, (3, size, size), init=False)
    load_weights(model, str(weights[0]), ema=weights[1])
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for layer in layers or ():
        if not 0 <= layer < len(routers):
            raise UserError(f"got layer {layer + 1}, expected 1 to {len(routers)}: those with routers")
    return [_draw(model.eval(), path, config, classes.names, layers) for path in paths]


def _draw(
    model: nn.Module, path: Path, config: Config, names: Sequence[str] | None, layers: Sequence[int] | None
) -> Overlay:
    with naming(str(path)):
        try:
            picture = as_seen(decode(path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{path} cannot be read as an image: {in_one_line(error)}") from error
    image = _prepared(picture, config)
    with torch.no_grad():
        prediction, macs, routings, shape = _run(model, image, (picture.height, picture.width))
    beside = macs.neck + macs.head
    share = (float(macs.backbone[0]) + beside) / (macs.static_backbone + beside)
    shown = functional.to_dtype(functional.pil_to_tensor(picture), scale=True)
    heat = _heat_map(shown, routings, shape, layers)
    told = f"{share:.0%} of the dense MACs"
    drawn = dense_overlay(picture, prediction, heat, names, caption=told, threshold=_LIKELY)
    return Overlay(path, drawn, share, found=_tell(prediction, names))


def _prepared(picture: Image.Image, config: Config) -> Tensor:
    """What evaluation makes of a picture: float32 [3, h, w], normalised."""
    data: Any = config.data
    image = functional.to_dtype(functional.pil_to_tensor(picture), scale=True)
    if config.task == "segmentation":  # a detector resizes by itself
        short = data.image_size
        image = functional.resize(image, [short], max_size=_LONGEST * short, antialias=True)
    half = [0.5] * 3  # drawn images are black at -1 and white at 1
    return functional.normalize(image, list(getattr(data, "mean", half)), list(getattr(data, "std", half)))


def _run(
    model: nn.Module, image: Tensor, size: tuple[int, int]
) -> tuple[Mapping[str, Tensor] | Tensor, PartMacs, Sequence[Routing], tuple[float, float]]:
    """What is found, the costs, the routings, and the image's share of the height and the width of the padded batch."""
    network: Any = model
    segments, shapes = isinstance(model, Segmenter), list[torch.Size]()
    inner: nn.Module = network.encoder if segments else network.backbone
    handle = inner.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    batch: Any = image.unsqueeze(0) if segments else [image]
    try:
        if isinstance(routed_part(model), RoutedModel):
            with dge_models.collect_routings(model) as collected:
                output, macs = forward_counted(model, batch)
            routings: Sequence[Routing] = collected.routings
        else:
            (output, macs), routings = forward_counted(model, batch), ()
    finally:
        handle.remove()
    inside = tuple(image.shape[-2:]) if segments else network.transform([image])[0].image_sizes[0]
    shape = inside[0] / shapes[0][-2], inside[1] / shapes[0][-1]
    return (likeliest(output[0], size) if segments else output[0]), macs, routings, shape


def _heat_map(
    shown: Tensor, routings: Sequence[Routing], shape: tuple[float, float], layers: Sequence[int] | None
) -> Image.Image | None:
    """The mean queries per token over the layers, without what the batch was padded with; None without routers."""
    chosen = [each for layer, each in enumerate(routings) if layers is None or layer in layers]
    if not chosen:
        return None
    # Drawn on a picture padded as the batch was, and cut again.
    rows, columns = (round(side / share) for side, share in zip(shown.shape[-2:], shape, strict=True))
    padded = torch.zeros(3, rows, columns)
    padded[:, : shown.shape[-2], : shown.shape[-1]] = shown
    maps, grids = [each.choice[0] for each in chosen], [each.grid for each in chosen]
    heat = dge_models.draw_heat_map(padded, maps, chosen[0].splits, grids=grids)
    return heat.crop((0, 0, round(heat.width * shape[1]), round(heat.height * shape[0])))


def _tell(prediction: Mapping[str, Tensor] | Tensor, names: Sequence[str] | None) -> str:
    """In words, what was found."""
    if isinstance(prediction, Tensor):
        numbers, counts = prediction.unique(return_counts=True)
        most = int(numbers[counts.argmax()])
        name = str(most) if names is None else names[most]
        return f"{len(numbers)} classes, most pixels {name}"
    count = int((prediction["scores"] >= _LIKELY).sum())
    return "1 object" if count == 1 else f"{count} objects"
