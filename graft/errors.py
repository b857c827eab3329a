"""Errors that a person can act on: a command reports them in one line.

`graft.cli.command` maps them to exit statuses.
"""


class InputError(Exception):
    """Something the user can mend: names what is wrong, where, and the next step, in one line."""


class RunError(Exception):
    """A run that cannot go on, through no fault of its input: says what was seen, in one line.

    Attributes:
        status: what the command exits with.
    """

    def __init__(self, text: str, *, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
