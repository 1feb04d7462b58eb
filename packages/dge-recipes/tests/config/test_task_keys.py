"""The keys of a task: which go together, and what a recorded configuration says."""

from collections.abc import Callable
from pathlib import Path

import pytest
from dense_recipes import dense_config

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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mixing.mixup=0.8"], "mixing: is for classification; got it with task=detection"),
        (["distillation.kind=none"], "distillation: is for classification"),
        (["train.label_smoothing=0.1"], r"train\.label_smoothing: is for classification"),
        (["data.classes=subset"], r"data\.classes: is for classification"),
        (["head.kind=upernet"], r"head\.kind: got upernet with task=detection, expected one of retinanet, "),
        (["head.kind=null"], r"head\.kind: got null with task=detection"),
        (["task=classification"], "data.name=scenes serves detection and segmentation; got task=classification"),
    ],
)
def test_what_detection_does_not_have_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dense_config("retinanet", tmp_path, *overrides)


def test_a_recorded_detector_is_read_back(tmp_path: Path) -> None:
    config = dense_config("retinanet", tmp_path)
    tree = parse_yaml(dump_config(config), "dump")
    assert not {"mixing", "distillation"} & set(tree)
    assert build_config(tree) == config
