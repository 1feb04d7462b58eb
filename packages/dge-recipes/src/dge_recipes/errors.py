"""What ends a command besides its work being done: a mistake, the machine, a request to stop, or nobody reading."""

import re

__all__ = ["MachineError", "RunStopped", "StdoutError", "UserError"]

_FROM_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process")


class UserError(ValueError):
    """A mistake in a command line, a config, a data folder or a checkpoint.

    The message is one line and names what came and what is expected. The command lines print it alone;
    any other exception is a fault of the program and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # PyTorch makes an exception of a data loading process anew, with that process's traceback as its text.
        found = _FROM_WORKER.match(message)
        if found is None:
            super().__init__(message)
        else:
            super().__init__(message.rpartition(f"{found[1]}: ")[2].strip())
            self.__cause__ = RuntimeError(message)


class MachineError(UserError):
    """What the machine did to a run: memory, disks, mounts, limits, processes that were killed.

    No mistake in what was asked for, and none of the program: the same command works on once the machine lets it.
    Told in one line too; the message says what happened and what usually helps. ``__cause__`` is the error as it came.
    """


class RunStopped(Exception):
    """A run was asked to stop, and has saved where it stands.

    Args:
        message: one line, for the user.
        interrupted: by Ctrl-C, which also ends whatever script the command is part of: its exit status is 130. Else
            it is 0, for a scheduler's request is not an error.
    """

    def __init__(self, message: str, *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted


class StdoutError(Exception):
    """What was printed could not be written. No OSError: those are caught where other files are written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno, self.reason = error.errno, error.strerror
