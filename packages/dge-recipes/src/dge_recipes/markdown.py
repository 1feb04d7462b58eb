"""Tables in Markdown: what commands print is what their reports hold, and can be pasted into an issue or a README."""

from collections.abc import Iterable, Sequence

__all__ = ["head", "line", "table"]


def line(cells: Iterable[str]) -> str:
    """One line of a table; a cell may be empty."""
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines, for tables that are printed while their rows are being measured."""
    return [line(names), "|---" * len(names) + "|"]


def table(names: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A whole table.

    Args:
        names: of the columns.
        rows: as many cells each.

    Raises:
        ValueError: a row has another number of cells.
    """
    lines = head(names)
    for row in rows:
        cells = list(row)
        if len(cells) != len(names):
            raise ValueError(f"rows: got one of {len(cells)} cells; expected {len(names)}, one for each column")
        lines.append(line(cells))
    return "\n".join(lines)
