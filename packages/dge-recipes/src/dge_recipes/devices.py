"""The device that a user names."""

import torch

from dge_recipes.errors import UserError

__all__ = ["find_device"]


def find_device(name: str) -> torch.device:
    """The device of ``--device``.

    Args:
        name: as PyTorch calls it; ``auto``: an accelerator where there is one, else the CPU.

    Raises:
        UserError: there is none of that name, or it computes nothing.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("--device meta: it computes nothing; expected cpu, cuda, cuda:1 ...")
    return device
