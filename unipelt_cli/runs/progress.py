"""How far an unfinished run has come, and the events that it recorded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unipelt_cli.files import sealed
from unipelt_cli.files.lock import lock_owner
from unipelt_cli.files.strict import parse_json
from unipelt_cli.runs import schema
from unipelt_cli.runs.names import FOLDS, METRICS, RESULT, STATE


def describe_progress(directory: Path) -> str:
    """Say how far an unfinished run got, and who is at it."""
    epochs = [event for event in read_metrics(directory) if event.get("kind") == "epoch"]
    folds = len(list(directory.glob(f"{FOLDS}/*/{RESULT}")))
    owner = lock_owner(directory)
    if folds and not epochs:
        parts = f"{folds} fold done" if folds == 1 else f"{folds} folds done"
        return parts + (f", {owner} is at it" if owner else "")
    if owner:
        return f"epoch {epochs[-1]['epoch'] if epochs else 0} done, {owner} is at it"
    return f"stopped after epoch {epochs[-1]['epoch']}" if epochs else "no epoch done"


def read_metrics(directory: Path) -> list[Mapping[str, Any]]:
    """Return the events of metrics.jsonl; a last line cut short by a crash is left out."""
    path = directory / METRICS
    events: list[Mapping[str, Any]] = []
    if not os.path.lexists(path):
        return events
    with sealed.own_file(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = parse_json(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("epoch"), int):
                events.append(event)
    return events


def read_state(directory: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]] | None:
    """Return the saved loop state of an interrupted run, or None where there is none."""
    path = directory / STATE
    if not os.path.lexists(path):
        return None
    tensors, header = sealed.open_tensors(path)
    return tensors, schema.shaped(path, header, schema.State)
