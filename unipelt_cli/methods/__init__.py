"""The table of methods, found by walking the folders here: each file's METHODS, merged."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.methods.base import (
    CannotMerge,
    Category,
    Method,
    NoKnownForm,
    Recipe,
    StagePosition,
    TrainingBatch,
)
from unipelt_cli.methods.forms import LowRankUpdates, Rescalings

__all__ = [
    "DEFAULT",
    "FLOOR",
    "CannotMerge",
    "Category",
    "LowRankUpdates",
    "Method",
    "NoKnownForm",
    "Recipe",
    "Rescalings",
    "StagePosition",
    "TrainingBatch",
    "get",
    "table",
]

DEFAULT = "unipelt-apl"
FLOOR = "probe"
"""What every run is set beside: what needs no training."""


@cache
def table() -> Mapping[str, Recipe]:
    """Return all methods by name; a name that two modules claim is a bug."""
    merged: dict[str, Recipe] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        recipes = getattr(importlib.import_module(module.name), "METHODS", {})
        if twice := merged.keys() & recipes.keys():
            raise RuntimeError(f"methods registered twice: {sorted(twice)}")
        merged |= recipes
    return MappingProxyType(merged)


def get(name: str) -> Recipe:
    """Return the recipe called `name`; raise ConfigError with the nearest name if absent."""
    if name not in table():
        hint = nearest(name, table(), "unipelt list methods")
        if "," in name:
            hint = f"a run has one method; write `unipelt sweep --methods {name}` for a run of each"
        raise ConfigError(f"method.name = {name!r}: no such method", hint)
    return table()[name]
