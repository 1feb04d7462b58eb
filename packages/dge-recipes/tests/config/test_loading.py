"""Recipes: shipped ones load, overrides apply, and every mistake is named with its full key."""

from pathlib import Path

import pytest

from dge_recipes.config import DigitsData, ImageFolderData, dump_config, list_configs, load_config
from dge_recipes.errors import UserError


@pytest.mark.parametrize("name", list_configs())
def test_shipped_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(copy)) == config


def test_published_rows_have_the_recipe_of_the_paper() -> None:
    for size in ("tiny", "small"):
        dge, dense = load_config(f"deit_dge_{size}_256"), load_config(f"deit_{size}_256")
        for config in (dge, dense):
            assert isinstance(config.data, ImageFolderData)
            assert (config.optim.name, config.optim.lr, config.optim.lr_batch) == ("adamw", 5e-4, 512)
            assert (config.train.epochs, config.train.batch_size, config.train.ema_decay) == (300, 32, 0.99996)
            assert (config.mixing.mixup, config.mixing.cutmix, config.mixing.switch_prob) == (0.8, 1.0, 0.5)
            assert (config.data.repeats, config.data.random_erasing) == (3, 0.25)
            assert config.optim.clip_grad is None
            assert config.model.kwargs == {"drop_path_rate": 0.1}
        assert (dge.schedule.warmup_epochs, dense.schedule.warmup_epochs) == (20, 5)
        assert (dge.budget.target, dge.budget.weight) == (0.5, 1.0)


def test_every_shipped_recipe_says_what_it_is_and_how_to_launch_it() -> None:
    for path in list_configs().values():
        head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        assert len(head[0]) > 30
        assert any(f"--config {path.stem}" in line for line in head)


def test_overrides_apply_in_order_and_reach_free_mappings() -> None:
    config = load_config("digits", ["optim.lr=1e-3", "optim.lr=2e-3", "model.kwargs.depth=7", "data.shift=0"])
    assert isinstance(config.data, DigitsData)
    assert (config.optim.lr, config.model.kwargs["depth"], config.data.shift) == (2e-3, 7, 0.0)


def test_override_of_a_section_that_a_recipe_leaves_out() -> None:
    assert load_config("digits", ["mixing.mixup=0.8"]).mixing.mixup == 0.8
    assert load_config("digits", ["model.convert={}"]).model.convert is not None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=1"], ["unknown key: 'optim.lrr'", "did you mean 'optim.lr'?"]),
        (["data.shif=1"], ["unknown key: 'data.shif'", "did you mean 'data.shift'?"]),
        (["data.root=/x"], ["unknown key: 'data.root' (it belongs to another data.name)"]),
        (["nothing.like.this=1"], ["unknown key: 'nothing.like.this'"]),
        (["model.convert.split=[4]"], ["unknown key: 'model.convert.split'"]),
        (["optim.lr=fast"], ["'optim.lr'", "'fast' (str)", "expected a valid number"]),
        (["train.epochs=1.5"], ["'train.epochs'", "1.5 (float)", "expected a valid integer"]),
        (["train.epochs=0"], ["'train.epochs'", "got 0", "greater than or equal to 1"]),
        (["train.epochs=true"], ["'train.epochs'", "True (bool)"]),
        (["budget.target=1.5"], ["'budget.target'", "less than or equal to 1"]),
        (["optim.lr=.nan"], ["'optim.lr'", "nan"]),
        (["model.name=3"], ["'model.name'", "3 (int)", "expected a valid string"]),
        (["train=3"], ["'train'", "got 3"]),
        (["optim.betas=[0.9]"], ["'optim.betas': got [0.9], expected more values"]),
        (["optim.betas=[0.9, 1]"], ["'optim.betas.1'", "expected less than 1"]),
        (["optim.betas=0.9"], ["'optim.betas'", "expected a list, for example [a, b]"]),
        (["model.kwargs=3"], ["'model.kwargs'", "expected a mapping, for example {a: 1}"]),
        (["train.checkpoint_activations=1"], ["'train.checkpoint_activations'", "expected true or false"]),
        (["data.name=cifar"], ["'data.name'", "'cifar'", "digits, imagefolder"]),
        (["data={}"], ["'data.name'", "None"]),
        (["output={}"], ["missing key: 'output.dir'"]),
        (["model.training_mode=fast"], ["'model.training_mode'", "'dense' or 'sparse'"]),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config("digits", overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"optim\.lr.*train\.epoch"):
        load_config("digits", ["optim.lr=-1", "train.epoch=3"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("optim..lr=3", "not of the form section.key=value"),
        ("optim.lr.x=3", "'optim.lr' holds 0.01, not a section"),
        ("optim.lr=[", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_read(override: str, words: str) -> None:
    with pytest.raises(UserError, match=r"override|key") as error:
        load_config("digits", [override])
    assert words in str(error.value)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="must be a mapping of sections, got list"):
        load_config(str(path))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(path))
