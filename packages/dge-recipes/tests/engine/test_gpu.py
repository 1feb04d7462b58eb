"""Training on a GPU: in bfloat16, exactly resumed, compiled, and without waiting for the device.

What a CPU can do too is tried on both. A GPU's exact resume needs PyTorch's deterministic algorithms, as it does in a
user's own runs.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dge_recipes import train as recipe
from dge_recipes.config import Config
from dge_recipes.engine.losses import LossModule
from dge_recipes.engine.progress import StepPosition
from dge_recipes.engine.reporting import Reporter
from dge_recipes.engine.run import Run
from dge_recipes.errors import MachineError, UserError
from dge_recipes.train import train

_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
_CLOCK = {"images_per_second", "data_share", "memory_mib"}

if torch.cuda.is_available():  # cuBLAS reads it once, when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs."""
    return str(request.param)


@pytest.fixture
def config_on(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """Build a small config for a device; AdamW, as the recipes for GPUs have it."""

    def build(device: str, *overrides: str, **names: str) -> Config:
        place = "cpu" if device == "cpu" else "auto"
        return small_config(f"train.device={place}", "optim.name=adamw", "optim.lr=1e-3", *overrides, **names)

    return build


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher config for GPUs asks for."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, and an error where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[bool], None]]:
    """Switch: have PyTorch raise an error whenever the host waits for the device."""

    def switch(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    if torch.cuda.is_available():
        switch(False)


def _records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _CLOCK} for line in lines]


def _state(config: Config) -> dict[str, Tensor]:
    """All tensors of the last checkpoint, by file and name."""
    last = sorted((Path(config.output.dir) / "checkpoints").glob("step_*"))[-1]
    files = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    return {f"{last.name} {file} {name}": value for file in files for name, value in load_file(last / file).items()}


@pytest.mark.usefixtures("bf16", "deterministic")
def test_bf16_training_resumes_exactly(
    config_on: Callable[..., Config], device: str, stateful: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (config_on(device, *stateful, output=name) for name in ("whole", "stopped"))
    summary = train(whole)
    assert summary["mixed_precision"] == "bf16"
    assert (summary["device"] == "cpu") == (device == "cpu")
    original = Reporter.step

    def killed(reporter: Reporter) -> None:
        original(reporter)
        if reporter._progress.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reporter, "step", killed)
        train(stopped)
    train(stopped, resume="auto")
    first, second = _state(whole), _state(stopped)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert _records(whole) == _records(stopped)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_bf16_losses_are_those_of_float32_to_rounding(
    config_on: Callable[..., Config],
    device: str,
    mode: str,
    fresh_accelerate: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("train.log_every=1", "train.epochs=1", f"model.training_mode={mode}", "budget.noiseless_epochs=1")
    losses = []
    for precision in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        config = config_on(device, *options, "schedule.warmup_epochs=0", output=precision)
        fresh_accelerate()
        assert train(config)["mixed_precision"] == precision
        losses.append([record["loss"] for record in _records(config) if record["kind"] == "train"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
def test_evaluation_finds_what_the_cpu_finds(
    config_on: Callable[..., Config], device: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    config = config_on(device, "train.batch_size=60", "optim.lr=5e-3")
    train(config)
    found = []
    for place in ("auto", "cpu"):
        files = ("--json", str(tmp_path / f"{place}.json"), "--plot", str(tmp_path / f"{place}.png"))
        budget = ("--budget", "0.8", f"train.device={place}")
        told = command("-m", "dge_recipes.evaluate", config.output.dir, *budget, *files)
        assert told.returncode == 0, told.stderr
        found.append(json.loads((tmp_path / f"{place}.json").read_text(encoding="utf-8")))
    assert found[0]["device"] != found[1]["device"] == "cpu"
    assert found[0]["images"] == found[1]["images"] == 360
    at_budget = [each["budgets"][0] for each in found]
    assert 0.7 < at_budget[0]["mac_ratio"] < 0.9
    # A region whose two best splits are equal to rounding may be routed otherwise.
    for one, two in (found, at_budget):
        assert one["acc1"] == pytest.approx(two["acc1"], abs=2 * 100 / 360)
        assert one["macs"] == pytest.approx(two["macs"], rel=0.01)
        assert one["loss"] == pytest.approx(two["loss"], rel=0.01)


def test_a_bad_number_is_found_one_forward_late_on_a_gpu(
    config_on: Callable[..., Config], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, forwards = LossModule.forward, []

    def poisoned(module: LossModule, images: Tensor, *rest: Any) -> dict[str, Tensor]:
        forwards.append(len(images))
        if len(forwards) == 3:
            images[0, 0, 0, 0] = float("inf")
        return original(module, images, *rest)

    monkeypatch.setattr(LossModule, "forward", poisoned)
    # Neither a checkpoint nor the end of an epoch, before which the newest loss is waited for.
    config = config_on(device, "train.batch_size=120", "train.log_every=100")
    with pytest.raises(UserError, match="not finite at step 3 in process 0"):
        train(config)
    assert len(forwards) == (3 if device == "cpu" else 4)
    saved = Path(config.output.dir) / "bad_batches" / "step_00000003_process_0.safetensors"
    assert load_file(saved)["images"][0, 0, 0, 0] == float("inf")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor's advice on precision and speed
def test_inductor_trains_to_the_same_losses(config_on: Callable[..., Config], device: str) -> None:
    losses = []
    for name, compiled in (("eager", "null"), ("compiled", "inductor")):
        # Without noise, because a compiled model draws other numbers.
        options = ("train.epochs=1", "train.log_every=1", "budget.noiseless_epochs=1", f"train.compile={compiled}")
        config = config_on(device, *options, output=name)
        train(config)
        losses.append([record["loss"] for record in _records(config) if record["kind"] == "train"])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def _between_log_lines(
    monkeypatch: pytest.MonkeyPatch, switch: Callable[[bool], None], extra: Callable[[Run], None]
) -> list[int]:
    """Switch on before step 4 and off before step 9, when the loop is warm; returns the steps that are watched."""
    original, watched = recipe.forward_backward, list[int]()

    def guarded(run: Run, place: StepPosition, images: Tensor, labels: Tensor) -> None:
        if place.step in (4, 9):
            switch(place.step == 4)
        original(run, place, images, labels)
        if 4 <= place.step < 9:
            watched.append(place.step)
            extra(run)

    monkeypatch.setattr(recipe, "forward_backward", guarded)
    return watched


_PLAIN = ("train.batch_size=120", "train.epochs=1", "train.log_every=100", "train.ema_decay=0.9", "mixing.mixup=0.4")


@pytest.mark.usefixtures("bf16")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
class TestNoWaiting:
    """Between two log lines the host never waits for the device, copies of the data included."""

    pytestmark = _GPU

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_step_waits_for_nothing(
        self,
        config_on: Callable[..., Config],
        no_waiting: Callable[[bool], None],
        monkeypatch: pytest.MonkeyPatch,
        workers: int,
    ) -> None:
        watched = _between_log_lines(monkeypatch, no_waiting, lambda run: None)
        train(config_on("cuda", *_PLAIN, f"data.workers={workers}"))
        assert watched == [4, 5, 6, 7, 8]

    def test_a_step_that_waits_is_noticed(
        self,
        config_on: Callable[..., Config],
        no_waiting: Callable[[bool], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        watched = _between_log_lines(monkeypatch, no_waiting, lambda run: print(run.averages._sums))
        with pytest.raises(RuntimeError, match="synchroniz"):
            train(config_on("cuda", *_PLAIN))
        assert watched == [4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_gpu_without_memory(config_on: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Reporter.step

    def hungry(reporter: Reporter) -> None:
        step(reporter)
        torch.empty(1 << 45, device="cuda")

    monkeypatch.setattr(Reporter, "step", hungry)
    with pytest.raises(MachineError, match=r"^the GPU is out of memory \(.* were asked for\); smaller batches"):
        train(config_on("cuda"))
