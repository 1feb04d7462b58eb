"""Finding recipes and launcher configs by name."""

from pathlib import Path

import pytest
import yaml

from dge_recipes.config import config_path, launcher_path, list_launchers
from dge_recipes.config.loading import first_comment
from dge_recipes.errors import UserError


def test_name_or_path(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.touch()
    assert config_path("digits").name == "digits.yaml"
    assert config_path(str(own)) == own


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "did you mean 'digits'"),
        ("zzz", "expected one of"),
        ("no/such.yaml", "config file 'no/such.yaml' does not exist"),
    ],
)
def test_unknown_recipe(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_path(name)


def test_a_run_is_no_recipe_but_holds_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; expected a YAML file, such as .*/config.yaml"):
        config_path(str(tmp_path))


def test_unknown_launcher() -> None:
    with pytest.raises(UserError, match="no launcher is called 'gpus'"):
        launcher_path("gpus")


def test_launchers_are_headed_and_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    expected = {"cpu": (2, 1), "gpu": (1, 1), "gpu8": (8, 1), "two_nodes": (16, 2)}
    for name, path in list_launchers().items():
        assert first_comment(path)
        config = ClusterConfig.from_yaml_file(path)
        assert (config.num_processes, config.num_machines) == expected.pop(name)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["use_cpu"] is (name == "cpu")
    assert not expected
