"""The README's command lines are ones that the commands take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dge_recipes.commands import benchmark, compress, convert, evaluate, export, train, visualize
from dge_recipes.config import launcher_path, load_config

_OTHERS: dict[str, Any] = {
    "dge-benchmark": benchmark,
    "dge-compress": compress,
    "dge-convert": convert,
    "dge-export": export,
    "dge-visualize": visualize,
}
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
    if program in _OTHERS:
        _OTHERS[program]._parser().parse_intermixed_args(arguments)
    elif program in {"dge-eval", "dge_recipes.evaluate"}:
        options = evaluate._parser().parse_intermixed_args(arguments)
        load_config(options.config or ("deit_tiny_256" if options.overrides else "digits"), options.overrides)
    else:
        assert program in {"dge-train", "dge_recipes.train"}
        options = train._parser().parse_intermixed_args(arguments)
        load_config(options.config, train._overrides(options))


def test_there_are_some() -> None:
    assert len(_lines()) >= 18
