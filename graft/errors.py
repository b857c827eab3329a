"""Errors that a user can act on; a command reports them in one line.

`graft.cli.command` maps them to exit statuses.
"""


class InputError(Exception):
    """Something the user can fix: names what is wrong, where, and the next step, in one line."""


class RunError(Exception):
    """A run that cannot continue although its input is valid: says what happened, in one line.

    Attributes:
        status: exit status of the command.
    """

    def __init__(self, text: str, *, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
