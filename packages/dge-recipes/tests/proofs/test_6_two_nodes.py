"""Two machines of one process each, meeting over a port, train what two processes of one machine train."""

import json
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import launch

from dge_recipes.config import launcher_path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _node(launcher: str, rank: int, port: int) -> list[str]:
    """As on one of two machines; the first one's address is 127.0.0.1."""
    if launcher == "torchrun":
        size = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        return ["-m", "torch.distributed.run", *size, *meeting]
    config = ["--config_file", str(launcher_path("two_nodes")), "--num_processes", "2", "--mixed_precision", "no"]
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return ["-m", "accelerate.commands.launch", *config, "--machine_rank", str(rank), *meeting]


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any], small: Sequence[str]) -> Path:
    """Two processes of one machine."""
    folder = tmp_path_factory.mktemp("one_machine") / "run"
    result = command(*launch("torchrun", 2), "dge_recipes.train", "--config", "digits", *small, f"output.dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_equal_one(
    start: Callable[..., "subprocess.Popen[str]"],
    small: Sequence[str],
    one_machine: Path,
    assert_equal_runs: Callable[..., None],
    tmp_path: Path,
    launcher: str,
) -> None:
    port, run = _free_port(), tmp_path / "run"
    command = ["-m", "dge_recipes.train", "--config", "digits", *small, "train.device=cpu", f"output.dir={run}"]
    nodes = [start(*_node(launcher, rank, port), *command) for rank in (0, 1)]
    outputs = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["num_processes"] == 2
    assert [out.count("| model |") for out, _ in outputs] == [1, 0]
    assert_equal_runs(one_machine, run)
