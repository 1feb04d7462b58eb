"""Whether wheels that are released together ask for each other: each for a version below it that was tested with it.

Usage: python pins.py WHEEL ...   (needs packaging)
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ASKS_FOR = {"dge-models": "dge-kernels", "dge-recipes": "dge-models"}


def metadata(wheel: Path) -> tuple[str, Version, list[Requirement]]:
    """Name, version and requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    return fields["Name"], Version(fields["Version"]), [Requirement(text) for text in fields.get_all("Requires-Dist")]


def faults(wheels: list[Path]) -> list[str]:
    """Everything that is wrong with the pins."""
    found = [metadata(wheel) for wheel in wheels]
    versions = {version.public for _, version, _ in found}
    wrong = [] if len(versions) == 1 else [f"the wheels have several versions: {', '.join(sorted(versions))}"]
    seen = {name for name, _, _ in found}
    wrong += [f"there is no wheel of {name}" for name in sorted({*ASKS_FOR, *ASKS_FOR.values()} - seen)]
    for name, version, requirements in found:
        below = ASKS_FOR.get(name)
        if below is None:
            continue
        pins = [each for each in requirements if each.name == below]
        if len(pins) != 1 or not pins[0].specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} asks for {[str(each) for each in pins]}; expected {below} {version.public}")
        elif pins[0].specifier.contains(Version(f"{version.major + 1}.0"), prereleases=True):
            wrong.append(f"{name} asks for {pins[0]}; expected an upper bound, releases above it were never tested")
    return wrong


def main() -> None:
    wrong = faults([Path(argument) for argument in sys.argv[1:]])
    print("pins: " + ("; ".join(wrong) or f"{len(sys.argv) - 1} wheels ask for each other"))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
