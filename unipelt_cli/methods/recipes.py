"""The recipes that a method can be trained by, and which methods are tried in which turn."""

from collections.abc import Mapping
from typing import Any

from unipelt_cli import methods
from unipelt_cli.methods.base import Recipe
from unipelt_cli.methods.few_labels import FEW_LABELS

DEFAULT = "default"
FEW = "few-labels"
PUBLISHED = "published"
NAMES = (DEFAULT, FEW, PUBLISHED)
"""The words by which recipes are asked for, the first one to be tried first."""


def recipes_of(entry: Recipe) -> tuple[str, ...]:
    """Return the recipes that a method has, its default first.

    What takes no step has no other. The recipe for few labels moves features, so what reads frozen
    ones cannot have it; a paper's is one where the paper names a learning rate for an encoder.
    """
    if entry.method.has_closed_form:
        return (DEFAULT,)
    has_few = not (entry.method.reads_frozen_features or is_for_few_labels(entry))
    has_paper = entry.paper_rate is not None
    return (DEFAULT, *((FEW,) if has_few else ()), *((PUBLISHED,) if has_paper else ()))


def is_for_few_labels(entry: Recipe) -> bool:
    """Say whether a method's default recipe is the one for few labels."""
    return entry.settings is FEW_LABELS


def rate_of(entry: Recipe, name: str) -> float:
    """Return the learning rate that a method's recipe is meant for."""
    rate = entry.paper_rate if name == PUBLISHED else entry.learning_rate
    assert rate is not None
    return rate


def suggested() -> list[str]:
    """Return the methods to try where nobody says which: the cheapest, our default, the others.

    Those that train the whole backbone cost most, in time and in what is stored, and come last.
    """

    def turn(name: str) -> tuple[bool, bool, bool]:
        entry = methods.get(name)
        is_cheap = entry.method.reads_frozen_features
        return not is_cheap, name != methods.DEFAULT, entry.category == "full"

    return sorted((name for name, entry in methods.table().items() if entry.is_suggested), key=turn)


def few_labels() -> dict[str, dict[str, Any]]:
    """Return the recipe for few labels as sections of settings of one's own."""
    sections: Mapping[str, Mapping[str, Any]] = FEW_LABELS
    return {name: dict(values) for name, values in sections.items()}
