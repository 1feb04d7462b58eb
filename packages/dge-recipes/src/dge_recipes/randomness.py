"""Randomness as a function of where a run stands, so that a resumed run draws what it would have drawn.

No generator state travels between steps: every random decision is made by a generator seeded from the
run's seed, a purpose and a position (epoch and sample, or optimiser step and process). A run stopped and
resumed, with any number of data loading workers, therefore continues exactly.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "isolated_seed", "seed_everything"]


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """An independent 32-bit seed for one purpose at one position.

    Args:
        seed: the run's seed, >= 0.
        purpose: what it is for; different purposes give unrelated seeds.
        position: where the run stands, for example (epoch, sample); each >= 0.

    Returns:
        The same seed for the same arguments, on every machine.
    """
    # A hash of the text, because NumPy's SeedSequence takes (1,) and (1, 0) for the same.
    digest = hashlib.blake2b(repr((seed, purpose, position)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device) from one 32-bit number."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch's CPU generator inside the block, and put their states back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
