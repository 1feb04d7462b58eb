"""The command lines of the README are ones that the studies take, and each study's help shows whole commands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resolution, served, training_overhead
from benchmarks.budget_study import __main__ as budget_study
from benchmarks.pretrained import __main__ as pretrained
from benchmarks.pretrained import distillation, save

STUDIES: dict[str, Any] = {
    "benchmarks.budget_study": budget_study,
    "benchmarks.pretrained": pretrained,
    "benchmarks.pretrained.distillation": distillation,
    "benchmarks.pretrained.save": save,
    "benchmarks.resolution": resolution,
    "benchmarks.served": served,
    "benchmarks.training_overhead": training_overhead,
}
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (Path(__file__).parent / "README.md").read_text("utf-8"), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", LINES)
def test_command_line(line: str) -> None:
    words = shlex.split(line, comments=True)
    start = words.index("-m")
    STUDIES[words[start + 1]]._parser().parse_intermixed_args(words[start + 2 :])


@pytest.mark.parametrize("name", STUDIES)
def test_help_shows_whole_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        STUDIES[name].main(["--help"])
    assert end.value.code == 0
    assert len(re.findall(rf"^  python -m {name}", capsys.readouterr().out, re.MULTILINE)) >= 2
    assert any(name in line for line in LINES)
