"""Models by name, and weights that fit them or do not."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dge_models import Router, trace
from dge_recipes.config import Config, ModelConfig
from dge_recipes.errors import UserError
from dge_recipes.models import build_model, create_model, display_name, is_routed, load_weights

SHAPE = (1, 32, 32)


def _build(config: Config, *, seed: int = 0, init: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config.model, 10, SHAPE, init=init)


def _save(model: nn.Module, path: Path) -> str:
    save_file(model.state_dict(), path)
    return str(path)


def test_routed_and_dense(small_config: Callable[..., Config]) -> None:
    assert is_routed(_build(small_config()))
    dense = _build(small_config(name="digits_dense"))
    assert not is_routed(dense)
    assert dense.training
    assert type(dense).__module__ == "timm.models.vision_transformer"


def test_training_mode_is_set(small_config: Callable[..., Config]) -> None:
    for mode in ("dense", "sparse"):
        model = _build(small_config(f"model.training_mode={mode}"))
        assert [block.training_mode for block in model.blocks] == [mode]  # type: ignore[union-attr]


def test_conversion_starts_as_the_same_function(small_config: Callable[..., Config], tmp_path: Path) -> None:
    dense = _build(small_config(name="digits_dense")).eval()
    weights = _save(dense, tmp_path / "dense.safetensors")
    model = _build(small_config(f"model.init_from={weights}", name="digits_converted"), seed=1).eval()
    images = torch.randn(3, *SHAPE)
    assert is_routed(model)
    assert display_name(small_config(name="digits_converted").model) == "deit_tiny_patch16_224 + DGE"
    assert any(isinstance(module, Router) for module in model.modules())
    torch.testing.assert_close(model(images), dense(images), rtol=1e-5, atol=1e-6)
    assert all(int(choice.max()) == 0 for choice in trace(model, images).granularity)


def test_init_from_another_head_keeps_the_new_one(small_config: Callable[..., Config], tmp_path: Path) -> None:
    config = small_config(name="digits_dense")
    torch.manual_seed(3)
    other = build_model(config.model, 7, SHAPE)
    weights = _save(other, tmp_path / "seven.safetensors")
    model = _build(small_config(f"model.init_from={weights}", name="digits_dense"))
    assert model.head.weight.shape[0] == 10  # type: ignore[union-attr]
    assert torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)  # type: ignore[index, union-attr]
    untouched = _build(small_config(f"model.init_from={weights}", name="digits_dense"), init=False)
    assert not torch.equal(untouched.pos_embed, other.pos_embed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=deit_tiny_patch16_225", "did you mean 'deit_tiny_patch16_2"),
        ("model.name=zzzzzz", "no model is called 'zzzzzz'"),
        ("model.kwargs.embed_dims=3", "cannot be created with model.kwargs"),
        ("model.kwargs.num_heads=5", "cannot be created with model.kwargs"),
        ("model.kwargs.patch_size=0", "cannot be created with model.kwargs.*by zero"),
        ("model.kwargs.num_classes=3", "model.kwargs.num_classes: got 3, expected none: it follows from the data"),
        ("model.kwargs.img_size=28", r"cannot take images of shape \[1, 32, 32\].*see model.kwargs"),
        ("model.kwargs.in_chans=3", "cannot take images of shape"),
        ("model.name=resnet18", "model.kwargs"),
    ],
)
def test_a_model_that_does_not_exist_or_fit(small_config: Callable[..., Config], override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        _build(small_config(override, name="digits_dense"))
    assert "\n" not in str(error.value)


def test_a_fault_of_a_model_is_not_blamed_on_who_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, **kwargs: object) -> None:
        raise AttributeError("a fault")

    monkeypatch.setattr("timm.create_model", broken)
    with pytest.raises(AttributeError, match="a fault"):
        create_model(ModelConfig(name="deit_tiny_patch16_224"), 10)
    with pytest.raises(UserError, match=r"cannot be created with model\.kwargs"):
        create_model(ModelConfig(name="deit_tiny_patch16_224", kwargs={"depth": 1}), 10)


def test_no_block_to_route(small_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"with model.kwargs=.*'depth': 0.*has no routed block"):
        _build(small_config("model.kwargs.depth=0"))


def test_what_cannot_be_converted(small_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"model\.convert: .* is converted already"):
        _build(small_config("model.convert={}"))


def test_weights_of_the_authors_files(small_config: Callable[..., Config], tmp_path: Path) -> None:
    model, average = _build(small_config()), _build(small_config(), seed=1)
    path = tmp_path / "reference.pth"
    content = {"model": model.state_dict(), "model_ema": average.state_dict(), "args": argparse.Namespace(model="x")}
    torch.save(content, path)
    for ema, expected in ((False, model), (True, average)):
        other = _build(small_config(), seed=2)
        load_weights(other, str(path), ema=ema)
        assert torch.equal(other.head.weight, expected.head.weight)  # type: ignore[arg-type, union-attr]


def test_weights_that_cannot_be_loaded(small_config: Callable[..., Config], tmp_path: Path) -> None:
    model = _build(small_config())
    path = tmp_path / "weights.safetensors"
    _save(model, path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(_build(small_config("model.kwargs.embed_dim=32")), str(path))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(_build(small_config(name="digits_dense")), str(path))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cannot be loaded.*truncated"):
        load_weights(model, str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_weights(model, str(tmp_path / "gone.pth"))
