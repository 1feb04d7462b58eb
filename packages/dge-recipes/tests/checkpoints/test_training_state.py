"""Saving and restoring a training state: bit-equal, by name, and never unpickled."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from dge_recipes.checkpoints import capture_state, restore_state
from dge_recipes.checkpoints.training_state import read_progress
from dge_recipes.errors import UserError


class _Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _model(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=width,
        depth=1,
        num_heads=2,
        num_classes=10,
    )


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 1, 16, 16)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "lamb"])
def test_a_restored_run_continues_bit_equal(name: str, tmp_path: Path) -> None:
    model, ema, counter = _model(), _model(seed=5), _Counter()
    optimizer = _optimizer(model, name)
    for seed in range(3):
        _step(model, optimizer, seed)
    counter.value = 3
    capture_state(model, ema, optimizer, {"progress": counter})(tmp_path)
    _step(model, optimizer, 3)

    again, other_ema, other_counter = _model(seed=9), _model(seed=9), _Counter()
    other = _optimizer(again, name)
    restore_state(tmp_path, again, other_ema, other, {"progress": other_counter})
    assert other_counter.value == 3
    _step(again, other, 3)
    for expected, got in ((model, again), (ema, other_ema)):
        for key, value in expected.state_dict().items():
            assert torch.equal(got.state_dict()[key], value), key
    for group, expected_group in zip(other.param_groups, optimizer.param_groups, strict=True):
        for key, value in expected_group.items():
            assert key == "params" or group[key] == value, key
    assert read_progress(tmp_path) == {"value": 3}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    model = _model()
    capture_state(model, None, _optimizer(model, "adamw"), {})(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_model_file_is_one_that_timm_loads(tmp_path: Path) -> None:
    model = _model()
    capture_state(model, None, _optimizer(model, "adamw"), {})(tmp_path)
    other = _model(seed=4)
    timm.models.load_checkpoint(other, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = _model()
    capture_state(model, None, _optimizer(model, "adamw"), {})(tmp_path)
    other = _model(width=32)
    with pytest.raises(UserError, match="does not fit this run") as error:
        restore_state(tmp_path, other, None, _optimizer(other, "adamw"), {})
    assert "\n" not in str(error.value)


def test_what_is_missing_is_refused(tmp_path: Path) -> None:
    model = _model()
    optimizer = _optimizer(model, "adamw")
    capture_state(model, None, optimizer, {})(tmp_path)
    with pytest.raises(UserError, match="does not fit this run"):
        restore_state(tmp_path, model, _model(), optimizer, {})
    with pytest.raises(UserError, match="does not fit this run"):
        restore_state(tmp_path, model, None, optimizer, {"progress": _Counter()})
    with pytest.raises(UserError, match="holds no training state"):
        read_progress(tmp_path)


def test_timm_loads_a_checkpoint_of_a_model_that_it_knows(tmp_path: Path) -> None:
    model = _model()
    before = torch.get_rng_state()
    capture_state(model, None, _optimizer(model, "adamw"), {})(tmp_path / "")
    assert torch.equal(torch.get_rng_state(), before)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    other, bare = tmp_path / "other", nn.Linear(2, 2)
    other.mkdir()
    capture_state(bare, None, _optimizer(bare, "adamw"), {})(other)
    assert not (other / "config.json").exists()
