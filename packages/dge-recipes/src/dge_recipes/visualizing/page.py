"""A web page in one file: nothing to install, nothing to load from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence

from dge_recipes.visualizing.overlays import Overlay

__all__ = ["html_page"]

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
figure { margin: 0 0 2rem; overflow-x: auto }
img { border: 1px solid #ddd; background: #fff }
figcaption { margin-bottom: .3rem }
"""


def html_page(overlays: Sequence[Overlay], title: str) -> str:
    """All overlays on one page, those that cost most first, pictures inside.

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
