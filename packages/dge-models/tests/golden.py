"""Recorded cases of the reference implementation, and files that its users might meet."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import golden_weights
import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def reference_weights(name: str, seed: int) -> dict[str, Tensor]:
    """Weights in the reference's layout, for the model of a file of keys."""
    return golden_weights.fill(golden_weights.from_keys(DATA / f"keys_{name}.txt"), seed)


class Golden:
    """One recorded case: arrays, weights, input."""

    def __init__(self, file: str) -> None:
        self.arrays = np.load(DATA / f"{file}.npz")
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        self.model: str = self.meta["model"]
        self.weights = reference_weights(self.model, self.meta["weight_seed"])
        self.images = golden_weights.image(self.meta["image_seed"], self.meta["batch"], self.meta["size"])

    def tensor(self, name: str) -> Tensor:
        """A recorded array."""
        return torch.from_numpy(self.arrays[name])

    def save(self, path: Path, **more: Any) -> Path:
        """Write a file as the authors' training writes it."""
        args = argparse.Namespace(model=self.model, lr=5e-4)
        torch.save({"model": self.weights, "epoch": 299, "args": args, **more}, path)
        return path


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
