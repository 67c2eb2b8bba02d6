"""What runs did before there were settings that said so."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

EARLIER: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "data": {"folds": 0},
        "model": {"normalise": False, "pairs": "joint"},
        "train": {
            "label_scale": "raw",
            "head_start": "random",
            "head_end": "trained",
            "balanced": False,
            "rows_per_class": 1,
            "contrast": 0.0,
        },
    }
)
"""By section and setting; a method's own are its `earlier`."""

BY_DEFAULT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **EARLIER,
        "model": {**EARLIER["model"], "pairs": "auto"},
        "train": {**EARLIER["train"], "label_scale": "auto"},
    }
)
"""The same as an experiment that nobody has begun says it: `auto` became what runs did."""
