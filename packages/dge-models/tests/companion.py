"""Libraries that people use beside timm; the tests with them are skipped where they are not installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest


def companion(name: str) -> Any:
    """The library; skips the file that asks for it if it is not there."""
    with warnings.catch_warnings():
        # Their own, when Python compiles them: backslashes in docstrings.
        warnings.filterwarnings("ignore", ".*invalid escape sequence", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*invalid escape sequence", SyntaxWarning)
        return pytest.importorskip(name, reason=f"{name} is not installed; the session companions has it")
