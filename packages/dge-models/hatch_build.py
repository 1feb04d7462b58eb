"""Puts the repository's VERSION and LICENSE, links in this folder, into the sdist as files of their own."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinkedFiles(BuildHookInterface):
    """Found by hatchling in this file; in an unpacked sdist, where there are no links, it changes nothing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the links' targets in the place of the links."""
        included = build_data["force_include"]
        for name in ("VERSION", "LICENSE"):
            link = Path(self.root) / name
            included.pop(str(link), None)  # hatchling adds the licence by itself, as the link that it is here
            included[str(link.resolve())] = name
