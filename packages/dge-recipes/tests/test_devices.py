"""Devices as users name them."""

import pytest
import torch

from dge_recipes.devices import find_device
from dge_recipes.errors import UserError


def test_names() -> None:
    assert find_device("cpu") == torch.device("cpu")
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert find_device("auto") == expected


@pytest.mark.parametrize(("name", "words"), [("toaster", "--device toaster: "), ("meta", "it computes nothing")])
def test_mistakes(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_device(name)
