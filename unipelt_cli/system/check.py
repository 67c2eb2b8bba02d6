"""One check of a machine or a run: what was looked at, and what to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `ok` is None for what is optional and absent, or not asked.

    `is_needed`: training the packaged task does not work where it fails.
    """

    what: str
    ok: bool | None
    outcome: str
    remedy: str | None = None
    is_needed: bool = False
