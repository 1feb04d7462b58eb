"""What measured: the command, and the state of the project that it ran in."""

import shlex
import subprocess
from collections.abc import Sequence

__all__ = ["provenance"]


def provenance(module: str, told: Sequence[str]) -> dict[str, str]:
    """``command`` and ``commit``, for a report. Ask for it when a run begins: what is checked out may change meanwhile.

    Args:
        module: that was run, such as ``benchmarks.served``.
        told: its arguments.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return {"command": shlex.join(["python", "-m", module, *told]), "commit": found.stdout.strip()}
