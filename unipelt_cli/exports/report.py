"""What an export says of itself, for its caller, its card and scripts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from unipelt_cli.exports.parity import Parity
from unipelt_cli.files.as_json import OPTIONAL
from unipelt_cli.gates.results import StaticReport


@dataclass(frozen=True)
class CheckedParity(Parity):
    """A parity, and how many of its rows were test rows of the run."""

    test_rows: int


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Where an export is, and how near it comes to its run; `bytes` of what was written."""

    format: str
    path: str
    written: bool
    static: StaticReport | None = field(default=None, metadata=OPTIONAL)
    parity: CheckedParity
    tolerance: float
    notes: Sequence[str]
    bytes: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def holds(self) -> bool:
        """Whether the written model computes the same, as far as was asked for."""
        return self.parity.max_abs_logit_diff <= self.tolerance
