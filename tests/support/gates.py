"""Gates as a command or a report gives them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from support.command import invoke

from unipelt_cli.gates.report import GateReport


def inspected(*arguments: str | Path) -> dict[str, Any]:
    code, stdout, stderr = invoke("inspect-gates", *arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def gate_report(*columns: list[float], labels: list[int], names: tuple[str, ...]) -> GateReport:
    """Make a report of one layer whose gates are called a, b, ... from their values by row."""
    gates = [{chr(97 + n): np.array(own, dtype=np.float32) for n, own in enumerate(columns)}]
    rows = Dataset.from_dict({"row": [10 + n for n in range(len(labels))], "label": labels})
    return GateReport(gates, rows, names)


LINES = re.compile(r"[█▏▎▍▌▋▊▉·]+")
