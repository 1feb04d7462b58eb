"""Telling what the machine did to a run from the program's own faults, whatever exception it comes as.

One table says what machines do to a run, and how that is recognised. Types and error numbers decide; the texts of
libraries only where they give neither. Whatever is not in the table is a fault of the program.
"""

import builtins
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dge_recipes.errors import MachineError, RunStopped, StdoutError, UserError

__all__ = ["machine_error", "machine_errors", "write_error"]


_WITHOUT_TYPE = frozenset({"OSError", "RuntimeError", "SafetensorError"})  # what libraries raise for anything


@dataclass(frozen=True)
class _Sign:
    """What an error is known by.

    Attributes:
        types: names of its class and of those above it.
        text: its message.
        number: the operating system's error number, if it has one.
        path: of the file, if it names one.
    """

    types: frozenset[str]
    text: str
    number: int | None = None
    path: str | None = None


@dataclass(frozen=True)
class _Fault:
    """One thing that a machine does.

    Attributes:
        helps: what usually helps.
        said: what happened, where the error's own words are a library's.
        numbers: names of the operating system's error numbers.
        types: names of exceptions that mean nothing else.
        words: a pattern for texts of exceptions that have neither.
    """

    helps: str
    said: str = ""
    numbers: tuple[str, ...] = ()
    types: frozenset[str] = frozenset()
    words: str = r"(?!)"

    def means(self, sign: _Sign) -> bool:
        """Whether an error is this one."""
        if sign.number is not None and sign.number in {getattr(errno, name, None) for name in self.numbers}:
            return True
        by_words = not _WITHOUT_TYPE.isdisjoint(sign.types) and re.search(self.words, sign.text) is not None
        return by_words or not self.types.isdisjoint(sign.types)


_SMALLER = "smaller batches (train.batch_size, eval.batch_size)"
_SHARED_MEMORY = _Fault(
    f"a larger one (docker run --shm-size), fewer data.workers or {_SMALLER} may help",
    "shared memory (/dev/shm) is full",
    words=r"(?s)(</torch_|/dev/shm|shared memory).*No space left on device",
)
_FAULTS = (
    _SHARED_MEMORY,  # before the disk, whose error number it has
    _Fault(
        f"{_SMALLER} with more train.accumulation_steps, train.checkpoint_activations=true or bf16 need less",
        "the GPU is out of memory",
        types=frozenset({"OutOfMemoryError"}),  # PyTorch's
        words=r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    ),
    _Fault(
        "another GPU, or this one after a reset, may do",
        "the GPU failed",
        words=r"uncorrectable ECC error|CUDA-capable device\(s\) is/are busy or unavailable|GPU is lost",
    ),
    _Fault(
        f"fewer data.workers or {_SMALLER} need less",
        "out of memory",
        numbers=("ENOMEM",),
        types=frozenset({"MemoryError"}),
        words=r"can't allocate memory|std::bad_alloc|not enough memory: you tried",
    ),
    _Fault("free some space", numbers=("ENOSPC", "EDQUOT")),
    _Fault("see ulimit -f, and what the file system allows", numbers=("EFBIG",)),
    _Fault("see why it can only be read: mount and dmesg may tell", numbers=("EROFS",)),
    _Fault(
        "a disk or a mount is failing or gone: dmesg may tell",
        numbers=("EIO", "ESTALE", "ENOTCONN", "ESHUTDOWN", "EREMOTEIO", "ENOLINK", "EUCLEAN", "EBADMSG", "EKEYEXPIRED"),
    ),
    _Fault(
        "a higher ulimit -n or fewer data.workers may help",
        "too many open files",
        numbers=("EMFILE", "ENFILE"),
        words=r"Too many open files|received 0 items of ancdata",
    ),
    _Fault(
        "a higher limit (ulimit -u, the container's) or fewer data.workers may help",
        "no more processes or threads may be started",
        numbers=("EAGAIN",),
        words=r"can't start new thread|^Resource temporarily unavailable",
    ),
    _Fault(
        "choose another (--main_process_port, --master_port)",
        "the port where the processes of the run were to meet is taken",
        words=r"EADDRINUSE",
    ),
    _Fault(
        "its own message, if it left one, says why",
        "another process of this run has ended or does not answer",
        types=frozenset({"DistNetworkError", "DistStoreError"}),  # PyTorch's
        words=r"(?s)gloo.*(closed by peer|reset by peer|Broken pipe|Timed out|timeout|Connection refused)"
        r"|ncclRemoteError|remote process exited or there was a network error|Watchdog caught collective",
    ),
    _Fault(
        "the other side is gone, or the network is",
        numbers=(
            *("EPIPE", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ETIMEDOUT"),
            *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        ),
    ),
)


def _find_fault(sign: _Sign) -> _Fault | None:
    """What an error is, or None: nothing that the machine did."""
    if sign.number == errno.ENOSPC and sign.path is None and _is_shared_memory_full():
        return _SHARED_MEMORY  # semaphores lie there too, and their errors name no file
    return next((fault for fault in _FAULTS if fault.means(sign)), None)


def _is_shared_memory_full() -> bool:
    try:
        return shutil.disk_usage("/dev/shm").free < os.sysconf("SC_PAGESIZE")
    except OSError:  # a system without it
        return False


@contextmanager
def machine_errors() -> Iterator[None]:
    """Inside ``with``, or in a decorated function, what the machine does is raised as :class:`MachineError`.

    Other errors pass; but where a data loading process is gone, that is what is told: the error of it comes from
    anywhere, as anything.

    Raises:
        MachineError: its ``__cause__`` is the error as it came.
        RuntimeError: a data loading process crashed.
    """
    try:
        yield
    except (MachineError, RunStopped, StdoutError):
        raise
    except Exception as error:
        told = _lost_worker(error) or machine_error(error)
        if told is None:
            raise
        raise told from error


def machine_error(error: Exception) -> MachineError | None:
    """What the machine did, if that is what an error, or one of its causes (``__cause__``), comes from.

    Args:
        error: as caught.

    Returns:
        The error to raise instead, or None: it is none of the machine's.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineError):
            return MachineError(str(cause))  # another, or it would be a cause of itself
        for sign in _signs(cause):
            fault = _find_fault(sign)
            if fault is not None:
                # What PyTorch says may have been taken for what it is not, such as a checkpoint that does not fit.
                by_words = fault.said or not isinstance(error, UserError)
                return MachineError(f"{_words(fault, sign) if by_words else error}; {fault.helps}")
        cause = cause.__cause__
    return None


def write_error(what: str, error: OSError) -> MachineError:
    """The error to raise where something could be written before: then the machine is why it no longer can.

    Args:
        what: what failed, such as "cannot write metrics.jsonl".
        error: as caught.
    """
    fault = next(filter(None, map(_find_fault, _signs(error))), None)
    helps = "it could be written before" if fault is None else fault.helps
    reason = str(error) if error.errno is None else os.strerror(error.errno)
    return MachineError(f"{what}: {reason}; {helps}")


def _lost_worker(error: Exception) -> Exception | None:
    workers = sys.modules.get("dge_recipes.data.workers")  # not imported: without descriptors nothing can be
    if workers is None:
        return None
    lost: Exception | None = workers.lost_worker(wait=isinstance(error, OSError | EOFError))
    return lost


def _words(fault: _Fault, sign: _Sign) -> str:
    asked = re.search(r"allocate ([\d.]+ (?:bytes|[KMGTPE]?i?B))", sign.text)
    words = fault.said or (sign.text if sign.number is None else os.strerror(sign.number))
    more = (f" ({asked[1]} were asked for)" if asked else "") + (f": {sign.path}" if sign.path else "")
    return words + more


def _signs(error: BaseException) -> Iterator[_Sign]:
    """An error; where it stands for one of another process, that one and its causes, which only its text tells."""
    text = str(error)
    if re.match(r"Caught \w+ in ", text):  # as PyTorch brings one from another process or thread
        yield from _signs_in(text)
        return
    types = frozenset(each.__name__ for each in type(error).__mro__)
    if isinstance(error, OSError) and error.errno is not None:
        yield _Sign(types, text, error.errno, None if error.filename is None else os.fsdecode(error.filename))
    else:
        yield _Sign(types, text, _number(types, text), _path(text))


def _signs_in(text: str) -> Iterator[_Sign]:
    """The errors in a printed traceback, the last first, as far as each is the direct cause of the next."""
    last = text.rpartition("\nDuring handling of the above exception, another exception occurred:\n")[2]
    for part in reversed(last.split("\nThe above exception was the direct cause of the following exception:\n")):
        found = re.search(r"(?m)^(?:Original )?([\w.]+)(?:: (.*))?$", part)  # all else is indented, or has a blank
        if found is not None:
            name, message = found[1].rpartition(".")[2], found[2] or ""
            known = getattr(builtins, name, None)
            types = frozenset(each.__name__ for each in known.__mro__) if isinstance(known, type) else frozenset({name})
            yield _Sign(types, message, _number(types, message), _path(message))


def _number(types: frozenset[str], text: str) -> int | None:
    """The error number that a text tells, as Python, Rust or PyTorch write it."""
    if _WITHOUT_TYPE.isdisjoint(types):
        return None
    found = re.search(r"\[Errno (\d{1,3})\]|\(os error (\d{1,3})\)", text)
    if found is not None:
        return int(found[1] or found[2])
    torch = re.search(r": ([^:]+) \((\d{1,3})\)", text)
    return int(torch[2]) if torch is not None and os.strerror(int(torch[2])) == torch[1] else None


def _path(text: str) -> str | None:
    """The file that an OSError's text names."""
    found = re.search(r"\[Errno \d+\] [^:]+: '(.*)'$", text)
    return None if found is None else found[1]
