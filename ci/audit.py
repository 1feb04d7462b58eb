"""What a dge-kernels wheel must not do: grow, lean on torch's unstable symbols, or carry the build machine's folders.

Usage: python audit.py WHEEL ...   (needs torch-abi-audit)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 10 * 2**20  # bytes
OLDEST_TORCH = (2, 10)


def abi_faults(package: Path) -> list[str]:
    """Symbols outside torch's stable ABI, or newer than the oldest torch that the package promises to run with."""
    run = subprocess.run(["torch-abi-audit", "--json", str(package)], capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    if Path(report["root"]) != package.resolve():
        return [f"the audit looked at {report['root']} instead of {package}"]
    faults = []
    using = 0
    for library in [*report["extensions"], *report["bundled_libs"]]:
        torch, name = library["torch"], Path(library["path"]).name
        using += torch["uses_torch"]
        faults += [f"{name}: {symbol} is not in torch's stable ABI" for symbol in torch["unstable_symbols"]]
        faults += [
            f"{name}: {symbol} is in no release of torch's stable ABI" for symbol in torch["unknown_shim_symbols"]
        ]
        if library["error"]:
            faults.append(f"{name}: {library['error']}")
        oldest = tuple(int(part) for part in (torch["min_torch_version"] or "0.0").split(".")[:2])
        if oldest > OLDEST_TORCH:
            faults.append(f"{name}: needs torch {torch['min_torch_version']} for {torch['version_defining_symbols']}")
    return faults if using else ["no library uses torch: the audit saw nothing"]


def dynamic_faults(package: Path) -> list[str]:
    """Search paths of the build machine, and a CUDA runtime that is not linked in."""
    faults = []
    for library in package.glob("*.so"):
        run = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True)
        bad = re.compile(r"R(UN)?PATH|NEEDED.*libcuda")
        faults += [f"{library.name}: {line.strip()}" for line in run.stdout.splitlines() if bad.search(line)]
    return faults


def audit(wheel: Path) -> list[str]:
    """Everything that is wrong with a wheel."""
    size = wheel.stat().st_size
    faults = [f"{size} bytes; at most {LARGEST} are allowed"] if size > LARGEST else []
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        package = Path(folder) / "dge_kernels"
        return faults + abi_faults(package) + dynamic_faults(package)


def main() -> None:
    failed = False
    for wheel in map(Path, sys.argv[1:]):
        faults = audit(wheel)
        failed = failed or bool(faults)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {'; '.join(faults) or 'stable ABI only: ok'}")
    raise SystemExit(failed or len(sys.argv) < 2)


if __name__ == "__main__":
    main()
