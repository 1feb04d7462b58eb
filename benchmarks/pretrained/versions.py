"""Which state of the project measured."""

import subprocess

__all__ = ["commit"]


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()
