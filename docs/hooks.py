"""Pages that are files of the repository, such as READMEs, with their links made to fit the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "packages/dge-kernels/README.md": "kernels.md",
    "packages/dge-models/README.md": "models.md",
    "packages/dge-recipes/README.md": "recipes.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/architecture.md": "architecture.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        if not source.startswith("docs/"):
            text = rewrite((ROOT / source).read_text(encoding="utf-8"), source)
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links of the pages that lie in docs/ fit too."""
    source = f"docs/{page.file.src_uri}"
    return rewrite(markdown, source) if source in PAGES else markdown


def rewrite(text: str, source: str) -> str:
    """Links to other pages lead to them; those to files that the site lacks become the files' names.

    Args:
        text: Markdown.
        source: The file that it is from, relative to the repository's root.

    Raises:
        FileNotFoundError: A link leads to no file.
    """

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: the link to {target} leads to {path}, which does not exist")
        if path in PAGES and not image:
            return f"[{label}]({PAGES[path]}{anchor or ''})"
        return f"{label} (`{path}`)"

    return _LINK.sub(replace, text)
