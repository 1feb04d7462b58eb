"""Makes the sdist whole: VERSION and LICENSE are links to the repository's, which lie outside of it."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LINKS = ("VERSION", "LICENSE")


class RepositoryFiles(BuildHookInterface):
    """An sdist hook; hatchling finds it by this file's name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Store the files that the links lead to. In an unpacked sdist they are files already."""
        for name in _LINKS:
            path = Path(self.root, name)
            # hatchling has put the licence on the list itself, but as a link.
            build_data["force_include"].pop(str(path), None)
            build_data["force_include"][str(path.resolve())] = name
