"""Charts, drawn by matplotlib without a display."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dge_recipes.errors import UserError

__all__ = ["draw_chart", "draw_curves"]


def draw_chart(path: Path, draw: Callable[[Any], None], *, title: str, x: str, y: str) -> None:
    """Save one chart as a picture.

    Args:
        path: the file; its suffix decides the format, ``.png`` or ``.svg``.
        draw: puts curves on matplotlib's axes.
        title: above the chart.
        x, y: what the axes show, with units.

    Raises:
        UserError: the file cannot be written.
    """
    # Imported late: only those who draw wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> None:
    """Save curves through points; a curve of one point is a dot.

    Args:
        path: as in :func:`draw_chart`.
        curves: points (x, y) by name.
        title, x, y: as in :func:`draw_chart`.
    """

    def draw(axes: Any) -> None:
        for name, points in curves.items():
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="o", label=name)

    draw_chart(path, draw, title=title, x=x, y=y)
