"""The one kind of error that a user of the recipes can cause and correct."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in a command line, a config, a data folder or a checkpoint.

    The message is one line and names what came and what is expected. The command lines print it alone;
    any other exception is a fault of the program and keeps its traceback.
    """
