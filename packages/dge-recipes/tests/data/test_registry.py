"""Every data set is known by its name, and knowing them costs nothing."""

from collections.abc import Callable
from typing import Any

from dge_recipes.data.registry import DATA_SETS


def test_names() -> None:
    assert (
        *("digits", "imagefolder", "cifar10", "cifar100", "inaturalist", "tar"),
        *("webdataset", "huggingface", "pictures", "shapes", "scenes", "coco", "segmentation_folder", "random"),
    ) == DATA_SETS


def test_configurations_do_not_wait_for_pytorch(command: Callable[..., Any]) -> None:
    imports = "import sys, dge_recipes.config, dge_recipes.data, dge_recipes.commands.train"
    result = command(
        "-c", f"{imports}\nprint([name for name in ('torch', 'torchvision', 'timm') if name in sys.modules])"
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_what_data_sets_publish_is_found_without_asking_for_its_file(command: Callable[..., Any]) -> None:
    result = command("-c", "import dge_recipes.data as data\nprint(all(getattr(data, name) for name in data.__all__))")
    assert result.stdout == "True\n"
    assert "has no attribute 'x'" in command("-c", "import dge_recipes.data\ndge_recipes.data.x").stderr
