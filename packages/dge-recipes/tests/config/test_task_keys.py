"""The keys of a task: which go together, and what a recorded configuration says."""

from collections.abc import Callable

import pytest

from dge_recipes.config import Config, dump_config, load_config
from dge_recipes.config.loading import build_config, parse_yaml
from dge_recipes.errors import UserError


def test_classification_is_the_default_and_recorded_as_before(small_config: Callable[..., Config]) -> None:
    config = small_config()
    assert (config.task, config.head.kind) == ("classification", None)
    tree = parse_yaml(dump_config(config), "dump")
    assert not {"task", "head"} & set(tree)
    assert build_config(tree) == config
    assert load_config("digits", ["task=classification"]) == load_config("digits")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=detection", "head.kind=retinanet"], "data.name=digits serves classification; got task=detection"),
        (["head.kind=retinanet"], "head: is for detection and segmentation; got it with task=classification"),
        (["task=tracking"], "wrong value for 'task': got 'tracking'"),
        (["tsk=detection"], r"unknown key: 'tsk' \(did you mean 'task'\?\)"),
    ],
)
def test_what_does_not_go_together_is_told(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("digits", overrides)
