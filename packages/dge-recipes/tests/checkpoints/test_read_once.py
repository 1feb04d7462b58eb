"""Weights are verified once and read once, however many parts of the program ask for them."""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dge_models import checkpoints as model_files
from dge_recipes.checkpoints import atomic_files, stored_classes, training_state
from dge_recipes.commands.convert import main as convert
from dge_recipes.commands.evaluate import main as evaluate
from dge_recipes.config import Config
from dge_recipes.train import train


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """How often each file, by its name, was hashed and how often its tensors were read."""
    hashed, read = Counter[str](), Counter[str]()

    def count(module: object, name: str, counter: Counter[str]) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def counted(path: Path, *arguments: Any, mmap: bool = False) -> Any:
            if mmap:  # names and shapes alone
                return original(path, *arguments, mmap=True)
            counter[Path(path).name] += 1
            return original(path, *arguments)

        monkeypatch.setattr(module, name, counted)

    count(atomic_files, "_digest", hashed)
    count(training_state, "load_file", read)
    count(model_files, "read_checkpoint", read)
    count(stored_classes.dge_models, "read_checkpoint", read)
    return hashed, read


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("named", [True, False])
def test_resuming(
    small_config: Callable[..., Config],
    counts: tuple[Counter[str], Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
    named: bool,
) -> None:
    config = small_config("train.ema_decay=0.5", "train.epochs=1")
    train(config)
    for counter in counts:
        counter.clear()
    monkeypatch.setattr("dge_recipes.train._train", _stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, resume=config.output.dir if named else "auto")
    hashed, read = counts
    tensors = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert (hashed, read) == (Counter(tensors | {"config.json", "state.json", "data.json"}), Counter(tensors))


def test_evaluating_and_converting_a_run(
    small_config: Callable[..., Config], counts: tuple[Counter[str], Counter[str]], tmp_path: Path
) -> None:
    config = small_config("train.epochs=1")
    train(config)
    hashed, read = counts
    for command in (evaluate, lambda arguments: convert([*arguments, str(tmp_path / "x.safetensors")])):
        hashed.clear()
        read.clear()
        assert command([config.output.dir]) == 0
        assert set(hashed.values()) == {1}
        assert read == Counter({"model.safetensors": 1})


def test_a_new_run_that_starts_from_another(
    small_config: Callable[..., Config], counts: tuple[Counter[str], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("train.epochs=1")
    train(config)
    hashed, read = counts
    hashed.clear()
    monkeypatch.setattr("dge_recipes.train._train", _stop)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(f"model.init_from={config.output.dir}", output="next"))
    assert set(hashed.values()) == {1}
    assert read == Counter({"model.safetensors": 1})


def test_a_file_that_has_to_be_unpickled_says_what_it_is_without_its_tensors(
    counts: tuple[Counter[str], Counter[str]], tmp_path: Path
) -> None:
    model = timm.create_model("deit_tiny_patch16_256", depth=1, num_classes=7)
    content = {"model": model.state_dict(), "args": argparse.Namespace(model="deit_tiny_patch16_256")}
    torch.save(content, tmp_path / "x.pth")
    assert convert([str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors"), "depth=1"]) == 0
    assert counts[1] == Counter({"x.pth": 1})
    content["args"].model = "deit_small_patch16_256"  # another file in its place is read anew
    torch.save({**content, "more": 1}, tmp_path / "x.pth")
    assert convert([str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors"), "depth=1"]) == 1
    assert counts[1] == Counter({"x.pth": 2})
