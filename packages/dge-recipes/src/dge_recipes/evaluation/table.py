"""Rows like those of the method's published table, in Markdown, and the published ones to put beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dge_recipes import markdown
from dge_recipes.config import Config, ImageData

__all__ = ["Published", "Row", "markdown_table", "published_row", "results_table", "show_macs", "show_speed"]


@dataclass(frozen=True)
class Published:
    """A row of the published table: ImageNet-1k validation at 256 x 256, the budget's target 0.5.

    Attributes:
        acc1, acc5: accuracy in percent.
        macs: mean multiply-accumulates per image.
    """

    acc1: float
    acc5: float
    macs: float


# Song et al., "Dynamic Grained Encoder for Vision Transformers", NeurIPS 2021.
_ROWS = {
    "deit_tiny_patch16_256": Published(73.2, 91.8, 1.7e9),
    "deit_dge_s124_tiny_patch16_256": Published(73.2, 91.7, 1.1e9),
    "deit_small_patch16_256": Published(80.6, 95.4, 6.1e9),
    "deit_dge_s124_small_patch16_256": Published(80.1, 95.0, 3.5e9),
}
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: its name.
        acc1, acc5: accuracy in percent.
        macs: mean multiply-accumulates per image.
        images_per_second: measured throughput, None where it was not measured.
        published: the authors' numbers for the same model, None where there are none.
    """

    model: str
    acc1: float
    acc5: float
    macs: float
    images_per_second: float | None
    published: Published | None = None


def markdown_table(rows: Iterable[Row]) -> str:
    """The table, with its head; a published row follows the measured one."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        scores = f"{row.acc1:.2f}", f"{row.acc5:.2f}"
        lines.append((row.model, *scores, show_macs(row.macs), show_speed(row.images_per_second)))
        if row.published is not None:
            known = row.published
            lines.append(("published", f"{known.acc1:.1f}", f"{known.acc5:.1f}", f"{known.macs / 1e9:.1f} G", ""))
    return markdown.table(("model", "Acc@1", "Acc@5", "mean MACs", "images/s"), lines)


def results_table(model: str, figures: Mapping[str, str], macs: float, images_per_second: float | None) -> str:
    """One row with any figures, with its head.

    Args:
        model: its name.
        figures: by what the columns are called.
        macs: mean multiply-accumulates per image.
        images_per_second: None where it was not measured.
    """
    columns = {"model": model, **figures, "mean MACs": show_macs(macs), "images/s": show_speed(images_per_second)}
    return markdown.table(list(columns), [columns.values()])


def show_macs(macs: float) -> str:
    """In millions or billions."""
    unit, name = (1e9, "G") if macs >= 1e9 else (1e6, "M")
    return f"{macs / unit:.2f} {name}"


def show_speed(value: float | None) -> str:
    """Images per second; None was not measured."""
    return "not measured" if value is None else f"{value:.0f}"


def published_row(config: Config, num_classes: int) -> Published | None:
    """The published row that an evaluation can be compared with, or None where there is none.

    Args:
        config: model and data of the evaluation; converted models and other image sizes have no row.
        num_classes: classes of the data set; the published ones are those of ImageNet.
    """
    comparable = isinstance(config.data, ImageData) and config.data.image_size == 256 and config.model.convert is None
    return _ROWS.get(config.model.name) if comparable and num_classes == _IMAGENET_CLASSES else None
