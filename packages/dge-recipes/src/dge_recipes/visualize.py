"""Where a model spends its queries, drawn over images. Its command line is ``commands/visualize.py``."""

import sys

from dge_recipes.commands.visualize import main

if __name__ == "__main__":  # before PyTorch is imported, which reads then what the command line sets
    sys.exit(main())

import base64
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import dge_models
from dge_models import Router
from dge_recipes.checkpoints.atomic_files import write_text
from dge_recipes.classes import Classes, match_classes
from dge_recipes.config import Config, ImageData
from dge_recipes.config.task_keys import HEADS
from dge_recipes.data.decoding import decode, in_one_line, naming
from dge_recipes.data.image_files import LeftOut, extension, image_extensions, is_hidden
from dge_recipes.data.image_sets import plain_images
from dge_recipes.data.pixels import as_seen
from dge_recipes.data.registry import DataConfig
from dge_recipes.data.transforms import evaluation_transform
from dge_recipes.errors import UserError
from dge_recipes.evaluation.target import Target
from dge_recipes.models import RoutedModel, is_routed, open_recipe, output_names, try_images

__all__ = ["Overlay", "check_recipe_classes", "draw_overlays", "find_images", "html_page", "main"]
__all__ += ["name_pictures", "prepare", "visualize", "write_pictures"]

_LOG = logging.getLogger(__name__)
_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
figure { margin: 0 0 2rem; overflow-x: auto }
img { border: 1px solid #ddd; background: #fff }
figcaption { margin-bottom: .3rem }
"""


@dataclass(frozen=True)
class Overlay:
    """What became of one image.

    Attributes:
        source: its file.
        picture: the drawing.
        share: the image's MACs over those with every query.
        guess: the likeliest class.
        confidence: its probability.
        name: what the likeliest class is called; None where the weights do not say.
        found: in words, what a detector or segmenter found, instead of a likeliest class.
    """

    source: Path
    picture: Image.Image
    share: float
    guess: int = 0
    confidence: float = 0.0
    name: str | None = None
    found: str | None = None

    @property
    def caption(self) -> str:
        """In words."""
        guess = self.guess if self.name is None else self.name
        found = f"class {guess} at {self.confidence:.0%}" if self.found is None else self.found
        return f"{self.source.name}: {self.share:.0%} of the dense MACs, {found}"


def visualize(
    target: Target, paths: Sequence[Path], *, ema: bool = False, layers: Sequence[int] | None = None
) -> list[Overlay]:
    """Draw how a model routes images; of a detector or segmenter also what it finds.

    Args:
        target: the model, its weights and the recipe whose evaluation the images are prepared as.
        paths: image files.
        ema: the averaged weights.
        layers: indices, from 0, of routed layers to draw; None: all.

    Raises:
        UserError: weights that do not fit, a model without routers, or images that are none or of another size.
    """
    if target.config.task in HEADS:
        from dge_recipes.visualize_dense import draw_found  # with libraries that the rest does without

        return draw_found(target, paths, ema=ema, layers=layers)
    source = str(target.weights or target.config.model.name)
    model = open_recipe(target.config.model, source, ema=ema)
    check_recipe_classes(target.config, output_names(model), source)
    if not is_routed(model):
        raise UserError(f"{target.config.model.name} has no routers, so there is nothing to draw")
    try_images(model, target.config.model, prepare(paths[0], target.config)[0].shape)
    return draw_overlays(model, paths, target.config, layers)


def check_recipe_classes(config: Config, names: Sequence[str] | None, checkpoint: str) -> None:
    """Compare the recipe's held-out images, if they are there, with what the weights know. Drawing does not need them.

    Args:
        config: the recipe; ``data.classes=new`` compares nothing.
        names: of the classes that the weights know; None: they do not say.
        checkpoint: where the weights are from, for the error.

    Raises:
        UserError: the images are of other classes.
    """
    data, root = config.data, getattr(config.data, "root", None)
    if names is None or data.classes == "new" or (root is not None and not Path(root).expanduser().exists()):
        return
    try:
        images = plain_images(config, "val", counted=False).identify()
    except UserError as error:
        _LOG.warning("the recipe's classes are not compared with those that the weights know: %s", error)
        return
    if images.classes.names is None:
        return
    model, subset = Classes(len(names), tuple(names)), data.classes == "subset"
    known, shown = f"the weights {checkpoint} know", f"the held-out images of {root or data.name} show"
    try:
        match_classes(model, images.classes, images.occurring, subset=subset, known=known, shown=shown)
    except UserError as error:
        raise UserError(f"{error}; --set data.classes=new draws without comparing them") from error


def draw_overlays(
    model: RoutedModel, paths: Sequence[Path], config: Config, layers: Sequence[int] | None = None
) -> list[Overlay]:
    """Draw how a model routes images.

    Args:
        model: with routers. Its guesses are told by name, if it knows the names of its classes.
        paths: image files.
        config: whose evaluation the images are prepared as.
        layers: indices, from 0, of routed layers to draw; None: all.

    Raises:
        UserError: a file that is no image, or a layer that does not exist.
    """
    device = next(model.parameters()).device
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for layer in layers or ():
        if not 0 <= layer < len(routers):
            raise UserError(f"got layer {layer + 1}, expected 1 to {len(routers)}: those with routers")
    splits, names = routers[0].splits, output_names(model)
    overlays = []
    for path in paths:
        tensor, shown = prepare(path, config)
        traced = dge_models.trace(model, tensor[None].to(device))
        probabilities = traced.logits[0].float().softmax(0)
        share = float(traced.macs[0] / traced.static_macs)
        guess = int(probabilities.argmax())
        confidence = float(probabilities[guess])
        caption = f"{share:.0%} of the dense MACs"
        picture = dge_models.draw_trace(torch.stack([shown]), traced, splits, layers=layers, captions=[caption])
        name = None if names is None else names[guess]
        found = None if model.num_classes else "no classes"
        overlays.append(Overlay(path, picture, share, guess, confidence, name, found))
    return overlays


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files that were named, and those directly inside named folders, in the order of their names.

    Files in the folders that are no images, by their names, are told in a warning for each folder; hidden ones are
    not.

    Raises:
        UserError: a path that does not exist, or no images at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _images_in(path)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    if not found:
        raise UserError(f"no images in {', '.join(paths)}")
    return found


def _images_in(folder: Path) -> list[Path]:
    extensions, left_out = image_extensions(), LeftOut()
    files = sorted(path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name))
    for path in files:
        if extension(path.name) not in extensions:
            left_out.add(str(path))
    if left_out.total():
        _LOG.warning("%s", left_out.told(str(folder)))
    return [path for path in files if extension(path.name) in extensions]


def name_pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The file of each image's picture; images of the same name in different folders stay apart.

    Raises:
        UserError: a picture would replace an image.
    """
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}_{number}", number + 1
        names.append(name)
    images, pictures = {path.resolve() for path in paths}, [folder / f"{name}.png" for name in names]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.resolve() in images:
            raise UserError(f"--output {folder}: the picture of {path} would replace the image {picture}")
    return pictures


def prepare(path: Path, config: Config) -> tuple[Tensor, Tensor]:
    """An image as a viewer shows it, as the model's input and as the same crop to draw on.

    Args:
        path: an image file.
        config: whose evaluation it is prepared as.

    Returns:
        The network's input float32 [C, H, W], and float32 [C, H, W] in [0, 1].

    Raises:
        UserError: it cannot be read.
    """
    with naming(str(path)):
        try:
            picture = as_seen(decode(path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{path} cannot be read as an image: {in_one_line(error)}") from error
        return _prepare(picture, config.data)


def _prepare(picture: Image.Image, data: DataConfig) -> tuple[Tensor, Tensor]:
    if isinstance(data, ImageData):
        tensor = evaluation_transform(data)(picture)
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (data.mean, data.std))
        return tensor, (tensor * std + mean).clamp(0, 1)
    resized = picture.resize((data.image_size, data.image_size), Image.Resampling.BICUBIC)
    shown = pil_to_tensor(resized.convert("L" if data.channels == 1 else "RGB")).float() / 255
    return shown * 2 - 1, shown


def write_pictures(overlays: Sequence[Overlay], pictures: Sequence[Path], page: Path | None, title: str) -> None:
    """Write each overlay to its file, and all of them to a web page if one is wanted.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        for overlay, path in zip(overlays, pictures, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            overlay.picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write to {pictures[0].parent}: {error}") from error
    if page is not None:
        # File names may hold bytes that are no text.
        write_text(page, html_page(overlays, title).encode("utf-8", "backslashreplace").decode("utf-8"))


def html_page(overlays: Sequence[Overlay], title: str) -> str:
    """All overlays on one page, those that cost most first. Pictures are inside, and nothing is loaded from elsewhere.

    Args:
        overlays: at least one.
        title: above them.
    """
    mean = sum(overlay.share for overlay in overlays) / len(overlays)
    figures = [
        f'<figure><figcaption>{html.escape(overlay.caption)}</figcaption><img alt="{_alt(overlay)}" '
        f'src="data:image/png;base64,{_encode(overlay)}"></figure>'
        for overlay in sorted(overlays, key=lambda each: -each.share)
    ]
    name = html.escape(title)
    summary = f"{len(overlays)} images, on average {mean:.0%} of the dense MACs; those that cost most come first"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{_STYLE}</style>'
        f"</head>\n<body><h1>{name}</h1><p>{summary}.</p>\n" + "\n".join(figures) + "\n</body></html>\n"
    )


def _alt(overlay: Overlay) -> str:
    return html.escape(f"{overlay.source.name}, and over it the regions that got many queries and few, layer by layer")


def _encode(overlay: Overlay) -> str:
    buffer = io.BytesIO()
    overlay.picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
