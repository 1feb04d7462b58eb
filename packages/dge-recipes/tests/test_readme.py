"""The README's command lines are ones that the commands take."""

import re
import shlex
from pathlib import Path

import pytest

from dge_recipes import evaluate, train
from dge_recipes.config import launcher_path, load_config
from dge_recipes.demo import __main__ as demo

_README = Path(__file__).parents[1] / "README.md"


def _lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", _README.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("pip ")]


@pytest.mark.parametrize("line", _lines())
def test_command_line(line: str) -> None:
    words = shlex.split(line, comments=True)
    for name in re.findall(r"--launcher (\w+)\)", line):
        assert launcher_path(name)
    program, arguments = words[0], words[1:]
    if program in {"python", "accelerate", "torchrun"}:
        start = words.index("-m")
        program, arguments = words[start + 1], words[start + 2 :]
    if program == "dge_recipes.demo":
        demo._parser().parse_intermixed_args(arguments)
    elif program in {"dge-eval", "dge_recipes.evaluate"}:
        options = evaluate._parser().parse_intermixed_args(arguments)
        load_config(options.config or "digits", options.overrides)
    else:
        assert program in {"dge-train", "dge_recipes.train"}
        options = train._parser().parse_intermixed_args(arguments)
        load_config(options.config, train._overrides(options))


def test_there_are_some() -> None:
    assert len(_lines()) >= 14
