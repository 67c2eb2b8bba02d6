"""The recipe for few labels, which the methods share that it was searched and measured with."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FEW_LABELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "model": {"normalise": True},
        "train": {
            "head_start": "means",
            "head_end": "means",
            "contrast": 2.0,
            "balanced": True,
            "rows_per_class": 2,
            "batch_size": 32,
            "epochs": 30,
            "patience": 30,
            "warmup": 0.1,
        },
    }
)
"""Defaults of the sections `model` and `train`.

A head that starts at class means on features of length 1 holds nothing up, and a schedule that
ends needs no dev row. Searched on dev rows alone: see README, "The recipe".
"""
