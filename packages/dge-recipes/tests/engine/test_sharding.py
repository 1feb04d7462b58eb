"""A run whose parameters are divided among processes is the run whose processes hold them all."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from torch import nn

from dge_recipes.config import Config, load_config
from dge_recipes.engine.sharding import adopt_launcher, check_sharding, local_part, whole_model
from dge_recipes.errors import UserError
from dge_recipes.evaluate import main as evaluate
from dge_recipes.train import train

# Muon iterates in bfloat16: the order of its sums would show.
STATEFUL = (
    "optim.name=adamw",
    "optim.lr=1e-3",
    "train.ema_decay=0.9",
    "train.batch_size=80",
    "train.accumulation_steps=3",
    "train.log_every=1",
    "mixing.mixup=0.4",
    "model.kwargs.depth=2",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=99",
)
STATE = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any], small: Sequence[str]
) -> dict[bool, Path]:
    """The same run of two processes, with DDP and sharded."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for sharded in (False, True):
        found[sharded] = folder / f"shard_{sharded}"
        overrides = [*small, *STATEFUL, f"train.shard={str(sharded).lower()}", f"output.dir={found[sharded]}"]
        if sharded:
            overrides.append("eval.timing_rounds=1")
        result = command(*launch("torchrun", 2), "dge_recipes.train", "--config", "digits", *overrides)
        assert result.returncode == 0, result.stderr
    return found


def test_it_computes_the_same(runs: dict[bool, Path]) -> None:
    for name in STATE:
        whole, sharded = (load_file(_last(runs[key]) / name) for key in (False, True))
        torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-6)
    lines = [(runs[key] / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for key in (False, True)]
    assert len(lines[0]) == len(lines[1]) > 0
    for one, two in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        assert one.get("loss") == pytest.approx(two.get("loss"), rel=1e-5)
        assert one.get("mac_ratio") == two.get("mac_ratio")


def test_each_process_holds_its_part(runs: dict[bool, Path]) -> None:
    whole, sharded = (json.loads((runs[key] / "summary.json").read_text(encoding="utf-8")) for key in (False, True))
    assert whole["parameters_in_main_process"] == whole["parameters"] == sharded["parameters"]
    # Uneven only where a dimension of 1 or 3 cannot be halved.
    assert sharded["parameters_in_main_process"] < 0.6 * sharded["parameters"]
    assert sharded["images_per_second"] > 0


def test_it_resumes_exactly_and_accelerates_launcher_may_ask_for_it(
    runs: dict[bool, Path], command: Callable[..., Any], small: Sequence[str], tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(runs[True], folder, ignore=shutil.ignore_patterns("summary.json", "step_*"))
    shutil.copytree(runs[True] / "checkpoints" / "step_00000002", folder / "checkpoints" / "step_00000002")
    (folder / "checkpoints" / "best.json").unlink(missing_ok=True)
    arguments = launch("accelerate", 2)
    arguments[-1:] = ["--use_fsdp", "--fsdp_version", "2", "-m"]
    overrides = [*small, *STATEFUL, f"output.dir={folder}"]
    result = command(*arguments, "dge_recipes.train", "--config", "digits", *overrides, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert load_config(str(folder / "config.yaml")).train.shard
    for name in STATE:
        one, two = (load_file(_last(run) / name) for run in (runs[True], folder))
        assert [key for key in one if not one[key].equal(two[key])] == []


def test_its_checkpoints_are_everyones(runs: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate([str(runs[True]), "--json", "found.json", "eval.timing_rounds=0"]) == 0
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    summary = json.loads((runs[True] / "summary.json").read_text(encoding="utf-8"))
    assert found["acc1"] == pytest.approx(summary["acc1"])
    assert found["macs"] == pytest.approx(summary["macs"])


def _last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def test_what_a_launcher_may_ask_for(small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    assert adopt_launcher(config) is config
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="asks for FSDP version 1; expected --fsdp_version 2"):
        adopt_launcher(config)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="FSDP_OFFLOAD_PARAMS=true, which is not supported: parameters stay"):
        adopt_launcher(config)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    assert adopt_launcher(config).train.shard
    assert not config.train.shard


@pytest.mark.parametrize(
    ("processes", "scaler", "overrides", "message"),
    [
        (1, None, (), "needs several processes; got 1"),
        (2, object(), (), "is not for fp16"),
        (2, None, ("train.compile=inductor",), "does not go with train.compile=inductor"),
    ],
)
def test_what_it_does_not_go_with(
    small_config: Callable[..., Config], processes: int, scaler: object, overrides: Sequence[str], message: str
) -> None:
    class Processes:
        num_processes = processes

    accelerator: Any = Processes()
    accelerator.scaler = scaler
    with pytest.raises(UserError, match=message):
        check_sharding(small_config("train.shard=true", *overrides), accelerator)


def test_one_process_is_told_before_anything_is_written(small_config: Callable[..., Config]) -> None:
    config = small_config("train.shard=true")
    with pytest.raises(UserError, match="needs several processes"):
        train(config)
    assert not Path(config.output.dir).exists()


def test_a_network_that_is_not_sharded_is_its_own_whole(small_config: Callable[..., Config]) -> None:
    network = nn.Linear(2, 2)
    assert whole_model(small_config(), network, (1, 32, 32), 10) is network
    assert local_part(network.weight).equal(network.weight)
    assert not local_part(network.weight).requires_grad
