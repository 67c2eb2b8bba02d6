"""What a sweep and its engines say to each other: which cells to train, and what happened to them.

Between processes it is lines of JSON, never pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from unipelt_cli.files.strict import parse_json


@dataclass(frozen=True)
class CellSpec:
    """A cell to train: its directory, and its experiment's settings."""

    directory: str
    settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CellReady:
    """Data and model of a cell are there: its training begins or goes on."""

    directory: str
    metric: str
    epochs: int


@dataclass(frozen=True)
class CellEpoch:
    """An epoch of a cell is over; `score` is the one on dev, if there is any."""

    directory: str
    epoch: int
    score: float | None


@dataclass(frozen=True)
class CellFinished:
    """A cell is finished."""

    directory: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class CellFailed:
    """A cell ended with an error; a traceback is there where it is a bug."""

    directory: str
    error: str
    hint: str
    traceback: str | None = None


@dataclass(frozen=True)
class CellStopped:
    """A cell was stopped on request, so that it can go on."""

    directory: str


CellEnd = CellFinished | CellFailed
CellReport = CellReady | CellEpoch | CellEnd | CellStopped
_KINDS: Mapping[str, type[CellReport]] = MappingProxyType(
    {
        "ready": CellReady,
        "epoch": CellEpoch,
        "finished": CellFinished,
        "failed": CellFailed,
        "stopped": CellStopped,
    }
)
_NAMES = MappingProxyType({kind: name for name, kind in _KINDS.items()})
_IDLE = "idle"


def dump_group(group: Sequence[CellSpec]) -> str:
    """Write the cells that are trained together as a line."""
    return json.dumps([vars(cell) for cell in group]) + "\n"


def parse_group(line: str) -> list[CellSpec]:
    """Read the cells that are trained together."""
    return [CellSpec(**cell) for cell in parse_json(line)]


def dump_report(report: CellReport | None) -> str:
    """Write what happened to a cell as a line; None says that the group is over."""
    if report is None:
        return json.dumps({"kind": _IDLE}) + "\n"
    return json.dumps({"kind": _NAMES[type(report)], **vars(report)}) + "\n"


def parse_report(line: bytes) -> CellReport | None:
    """Read what happened to a cell; None where the group is over."""
    values = dict(parse_json(line))
    kind = values.pop("kind")
    return None if kind == _IDLE else _KINDS[kind](**values)
