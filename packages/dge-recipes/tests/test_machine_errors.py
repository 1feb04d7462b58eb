"""What the machine does is told from the program's own faults; each text of a library is provoked where it can be."""

import datetime
import errno
import multiprocessing
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._utils import ExceptionWrapper

from dge_recipes.errors import MachineError, RunStopped, StdoutError, UserError
from dge_recipes.machine_errors import machine_error, machine_errors, write_error

_MEMORY = r"out of memory( \(.* were asked for\))?; fewer data.workers or smaller batches \(.*\) need less"
_FILES = r"too many open files(: /dev/null)?; a higher ulimit -n or fewer data.workers may help"
_PEER = r"another process of this run has ended or does not answer; its own message, if it left one, says why"


@contextmanager
def _limit(what: int, number: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def _open_too_many(use: Callable[[], object]) -> None:
    kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    for descriptor in kept:
        os.close(descriptor)
    with _limit(resource.RLIMIT_NOFILE, kept[0]):  # the lowest that is free
        use()


def _write_to_a_full_disk() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def _write_too_much() -> None:
    with _limit(resource.RLIMIT_FSIZE, 1000):
        save_file({"a": torch.zeros(1000)}, os.environ["PYTEST_TMP_FILE"])


def _write_to_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        os.write(writing, b"x")
    finally:
        os.close(writing)


def _meet(port: int | None, wait: float = 10) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1] if port is None else port
        torch.distributed.TCPStore(
            "127.0.0.1", number, 2, is_master=True, timeout=datetime.timedelta(seconds=wait), use_libuv=True
        )


@pytest.mark.parametrize(
    ("provoke", "told"),
    [
        (lambda: torch.empty(1 << 50), _MEMORY),
        (lambda: np.empty(1 << 50), _MEMORY),
        (lambda: bytearray(1 << 62), _MEMORY),
        (lambda: _open_too_many(Path("/dev/null").read_bytes), _FILES),
        (lambda: _open_too_many(torch.zeros(3).share_memory_), _FILES),
        (lambda: _open_too_many(multiprocessing.Pipe), _FILES),
        (_write_to_a_full_disk, "No space left on device; free some space"),
        (_write_too_much, "File too large; see ulimit -f, and what the file system allows"),
        (lambda: Path("/proc/self/mem").read_bytes(), "Input/output error; a disk or a mount is failing or gone: .*"),
        (_write_to_nobody, "Broken pipe; the other side is gone, or the network is"),
        (lambda: _meet(None), "the port where the processes of the run were to meet is taken; choose another .*"),
        (lambda: _meet(0, wait=0.5), _PEER),
    ],
)
def test_what_the_machine_does(
    provoke: Callable[[], object], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_TMP_FILE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=f"^{told}$") as caught, machine_errors():
        provoke()
    cause = caught.value.__cause__
    assert cause is not None
    assert not isinstance(cause, MachineError)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27",
        "NCCL error in: x.cpp:1, NCCL version 2.27\nncclRemoteError: A call failed possibly due to a network error",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1) ran for 600000 ms",
        "Error while creating shared memory segment /dev/shm/nccl-X (size 9), error: No space left on device (28)",
        "received 0 items of ancdata",
    ],
)
def test_texts_that_this_machine_cannot_be_made_to_say(text: str) -> None:
    assert machine_error(RuntimeError(text)) is not None
    assert machine_error(ValueError(text)) is None


def test_a_gpu_without_memory() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")
    said = str(machine_error(error))
    assert said.startswith("the GPU is out of memory (20.00 MiB were asked for); smaller batches (train.batch_size, ")


@pytest.mark.parametrize(
    "name",
    [
        *("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE"),
        *("ENOMEM", "EAGAIN", "EFBIG", "ETIMEDOUT", "ECONNRESET", "EHOSTDOWN"),
    ],
)
def test_numbers_of_the_operating_system(name: str) -> None:
    number = getattr(errno, name)
    found = machine_error(OSError(number, os.strerror(number), "/data/x.jpg"))
    assert found is not None
    assert ": /data/x.jpg; " in str(found)


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("[Errno 28] No space left on device"),
        RuntimeError("The size of tensor a (28) must match the size of tensor b (24)"),
        RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:1] op.preamble.length <= op.nbytes. 8 vs 4"),
        RuntimeError("[Errno 2] No such file or directory: 'x'"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        OSError("image file is truncated (28 bytes not processed)"),
        UserError("data folder x: No space left on device (28)"),
        _from(UserError("no config"), FileNotFoundError(errno.ENOENT, "No such file or directory", "x")),
        EOFError(),
        ZeroDivisionError(),
        RecursionError("maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_fault_of_the_machine(error: Exception) -> None:
    assert machine_error(error) is None
    with pytest.raises(type(error)) as caught, machine_errors():
        raise error
    assert caught.value is error


def test_an_error_while_another_is_handled_is_one_of_its_own() -> None:
    with pytest.raises(KeyError), machine_errors():
        try:
            _write_to_a_full_disk()
        except OSError:
            {}["a fault in what is done about it"]


@pytest.mark.parametrize("error", [RunStopped("saved"), StdoutError(BrokenPipeError(errno.EPIPE, "Broken pipe"))])
def test_other_ends_of_a_command_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, machine_errors():
        raise error from BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert caught.value is error


def test_a_users_words_are_kept_unless_they_take_the_machine_for_something_else() -> None:
    full = _from(UserError("cannot write x: the disk is full"), OSError(errno.ENOSPC, "No space left on device", "x"))
    assert str(machine_error(full)) == "cannot write x: the disk is full; free some space"
    memory = _from(UserError("checkpoint x does not fit this run"), RuntimeError("can't allocate memory"))
    assert "checkpoint" not in str(machine_error(memory))


def test_nothing_is_its_own_cause() -> None:
    wrapped = _from(ValueError("x"), MachineError("out of memory; use less"))
    with pytest.raises(MachineError, match=r"^out of memory; use less$") as caught, machine_errors(), machine_errors():
        raise wrapped
    assert caught.value.__cause__ is wrapped
    assert caught.value is not wrapped.__cause__


def _as_from_a_worker(error: Exception) -> None:
    """As PyTorch brings it."""
    try:
        raise error
    except type(error):
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapper.reraise()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/dev/null"), _FILES),
        (MemoryError(), _MEMORY),
        (
            RuntimeError("unable to write to file </torch_7_8>: No space left on device (28)"),
            r"shared memory .* is full.*",
        ),
        (
            _from(UserError("x.png: gone"), OSError(errno.EIO, "Input/output error")),
            "x.png: gone; a disk or a mount .*",
        ),
        (
            _from(ValueError("x"), OSError(errno.EIO, "Input/output error", "/a b")),
            "Input/output error: /a b; a disk .*",
        ),
        (MachineError("x.png: gone; a mount is"), "x.png: gone; a mount is"),
    ],
)
def test_from_a_data_loading_process(error: Exception, told: str) -> None:
    with pytest.raises(MachineError, match=f"^{told}$"), machine_errors():
        _as_from_a_worker(error)


def test_a_fault_of_ours_in_a_data_loading_process_stays_one() -> None:
    def fail() -> None:
        try:
            Path("/proc/self/mem").read_bytes()
        except OSError:
            raise ValueError("a fault in what is done about it")  # noqa: B904

    try:
        fail()
    except ValueError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError, match="Caught ValueError") as caught, machine_errors():
        wrapper.reraise()
    assert not isinstance(caught.value, UserError)
    with pytest.raises(UserError, match=r"^x\.png is no image$"), machine_errors():
        _as_from_a_worker(UserError("x.png is no image"))


def test_what_could_be_written_before(tmp_path: Path) -> None:
    told = write_error("cannot write x", FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))
    assert str(told) == "cannot write x: No such file or directory; it could be written before"
    told = write_error("cannot write x", OSError(errno.ENOSPC, "No space left on device"))
    assert str(told) == "cannot write x: No space left on device; free some space"
