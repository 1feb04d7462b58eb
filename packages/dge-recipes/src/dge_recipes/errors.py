"""What ends a command besides its work being done: a mistake that the user can correct, or a request to stop."""

__all__ = ["RunStopped", "UserError"]

_FROM_WORKER = "Caught UserError in DataLoader worker process"


class UserError(ValueError):
    """A mistake in a command line, a config, a data folder or a checkpoint.

    The message is one line and names what came and what is expected. The command lines print it alone;
    any other exception is a fault of the program and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # PyTorch makes an exception of a data loading process anew, with that process's traceback as its text.
        if message.startswith(_FROM_WORKER):
            message = message.rpartition("UserError: ")[2].strip()
        super().__init__(message)


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
