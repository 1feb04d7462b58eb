"""Whether an editable install is one: runs ci/dev in a copy of the repository, then edits and imports there.

Needs the environment that ci/nox made, which the copy shares.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Whether the kernels work, and where the packages come from; those that need much are found, not imported.
WHERE = """
import importlib.util, dge_kernels
facts = dge_kernels.build_info()
if not facts["cpu_loaded"]:
    raise SystemExit(facts["cpu_reason"])
for name in ("dge_kernels", "dge_models", "dge_recipes"):
    print(importlib.util.find_spec(name).origin)
"""


def copy_repository(to: Path) -> None:
    """The files that git knows or would add, links as links, their times kept."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    (to / ".bootstrap").symlink_to(ROOT / ".bootstrap")


def python(copy: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the copy's Python outside of it, so that nothing is imported from the current folder."""
    command = [str(copy / ".venv" / "bin" / "python"), *options, "-c", code]
    return subprocess.run(command, cwd=copy.parent, capture_output=True, text=True)


def check(holds: bool, what: str, why: str = "") -> None:
    """Say what was checked; end here where it does not hold."""
    if not holds:
        raise SystemExit(f"editing: not so: {what}\n{why}")
    print(f"editing: {what}")


def times(copy: Path, pattern: str) -> dict[Path, int]:
    """When each of the files was written."""
    return {path: path.stat().st_mtime_ns for path in copy.glob(pattern)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy_repository(copy)
        kernels = copy / "packages" / "dge-kernels"
        subprocess.run([str(copy / "ci" / "dev")], check=True)
        run = python(copy, WHERE, "-W", "error::UserWarning:dge_kernels")
        found = [path.startswith(str(copy / "packages")) for path in run.stdout.split()]
        check(found == [True] * 3, "all three packages are their sources", run.stdout + run.stderr)

        libraries, objects = ".venv/lib/python*/site-packages/dge_kernels/*.so", "packages/dge-kernels/build/**/*.o"
        built, compiled = times(copy, libraries), times(copy, objects)
        check(len(built) == 2 and len(compiled) > 4, "libraries lie in .venv, their objects in the build folder")
        with (kernels / "src" / "dge_kernels" / "functional.py").open("a") as source:
            source.write('\nEDITED = "now"\n')
        (kernels / "src" / "dge_kernels" / "added.py").write_text('ADDED = "too"\n')
        run = python(copy, "from dge_kernels import added, functional; print(functional.EDITED, added.ADDED)")
        check(run.stdout.split() == ["now", "too"], "a changed and a new Python file are imported", run.stderr)
        unchanged = times(copy, libraries) == built and times(copy, objects) == compiled
        check(unchanged, "nothing was built for them")

        (kernels / "csrc" / "schemas.cpp").touch()
        run = python(copy, "import dge_kernels")
        told = "schemas.cpp changed after the kernels were compiled: run ci/dev" in run.stderr
        check(told, "a changed C++ file is told, with what to do", run.stderr)
        subprocess.run([str(copy / "ci" / "dev")], check=True)
        changed = {path.name for path, time in times(copy, objects).items() if compiled.get(path) != time}
        check(changed == {"schemas.cpp.o"}, "ci/dev compiles what changed", str(changed))
        run = python(copy, "import dge_kernels", "-W", "error::UserWarning")
        check(run.returncode == 0, "nothing is told any more", run.stderr)


if __name__ == "__main__":
    main()
