"""The few ways in which a command can fail for a reason that its user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class UnipeltError(Exception):
    """Two sentences: what is wrong, with the value in it, and what to do."""

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(UnipeltError):
    """A setting, a name or a preset is wrong."""


class DataError(UnipeltError):
    """A data source is missing, unreadable or does not hold what was asked of it."""


class BackboneError(UnipeltError):
    """A backbone cannot be found, is unsafe to read, or lacks what a method needs."""


class RunError(UnipeltError):
    """A run directory is absent, unfinished, damaged, or belongs to something else."""


class CheckError(UnipeltError):
    """The command ran to its end, but what it made failed its own check."""

    exit_code = 1


class SweepError(UnipeltError):
    """A sweep ran to its end, but some of its cells failed."""

    exit_code = 3


def nearest(name: str, choices: Iterable[str], shown_by: str | None = None) -> str:
    """Return the hint for an unknown `name`: the nearest choice first, then all of them.

    Where they are many, `shown_by` is the command that shows them.
    """
    names = sorted(choices)
    folded = {known.casefold(): known for known in names}
    close = get_close_matches(name.casefold(), folded, n=1)
    listed = f"choose one of {', '.join(names)}" if shown_by is None else f"see `{shown_by}`"
    return f"did you mean {folded[close[0]]}? otherwise {listed}" if close else listed
