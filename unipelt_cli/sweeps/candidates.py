"""What `recommend` chooses among: a method by a recipe, at a learning rate, on a backbone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from unipelt_cli import methods
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.methods import recipes
from unipelt_cli.metrics import Values

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = (1 / 3, 3.0)  # of a recipe's own rate, which is tried first


@dataclass(frozen=True)
class Choice:
    """A method by a recipe, at a rate; a backbone where there are several to choose among."""

    method: str
    rate: float
    recipe: str = recipes.DEFAULT
    backbone: str | None = None
    backbone_name: str | None = None
    """What the backbone is called where it is read."""


@dataclass
class Trial:
    """One training: with one seed and scored on dev, or without one fold and scored on it.

    `state` is where its loop stands between two rungs; `predicted` what it says of its fold.
    """

    experiment: Experiment
    state: "tuple[Mapping[str, Tensor], Mapping[str, Any]] | None" = None
    score: float | None = None
    epoch: int = 0
    is_over: bool = False
    predicted: Values | None = None


@dataclass
class Candidate:
    """A choice, and what is known of it."""

    choice: Choice
    experiment: Experiment
    trials: list[Trial] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)
    """By folds: the score of the rows of the first fold, of the first two, and so on."""
    rung: int = -1
    rows: int = 0
    """So many rows it is judged on."""
    is_complete: bool = False
    """Whether it was trained to the end of the search."""
    seconds: float = 0.0
    stored_parameters: int = 0
    metric: str = ""
    error: str | None = None

    @property
    def is_floor(self) -> bool:
        """Whether it is what every other candidate has to beat; it stays to the end."""
        return self.choice.method == methods.FLOOR

    @property
    def rate(self) -> float | None:
        """The learning rate; None for what takes no step."""
        takes_none = self.experiment.method.has_closed_form
        return None if takes_none else self.experiment.train.learning_rate

    @property
    def method(self) -> str:
        """The method, and its recipe where it is not the default one."""
        is_default = self.choice.recipe == recipes.DEFAULT
        return self.choice.method if is_default else f"{self.choice.method} {self.choice.recipe}"

    @property
    def name(self) -> str:
        """What it is called where it is read."""
        rate = "" if self.rate is None else f" at {self.rate:g}"
        backbone = self.choice.backbone_name
        return f"{self.method}{rate}" + ("" if backbone is None else f" on {backbone}")

    @property
    def scores(self) -> list[float]:
        """The score of each training: the best one on dev so far, or that of its own fold."""
        return [trial.score for trial in self.trials if trial.score is not None]

    @property
    def score(self) -> float | None:
        """The mean over its seeds, or the score of all rows of its folds together."""
        if self.pooled:
            return self.pooled[-1]
        # Means that are equal in decimals are a little apart in binary numbers.
        return round(fmean(self.scores), 9) if self.scores else None

    @property
    def evidence(self) -> tuple[int, int, int]:
        """How well it is known: what was trained to the end is known alike."""
        return (1, 0, 0) if self.is_complete else (0, self.rung, len(self.scores))

    @property
    def epochs(self) -> int:
        """How many epochs its longest training took."""
        return max((trial.epoch for trial in self.trials), default=0)

    def beside(self, other: "Candidate") -> tuple[float, float]:
        """Return its score and another's on the rows that both were judged on."""
        if self.pooled and other.pooled:
            folds = min(len(self.pooled), len(other.pooled))
            return self.pooled[folds - 1], other.pooled[folds - 1]
        assert self.score is not None
        assert other.score is not None
        return self.score, other.score


def choices(
    names: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    recipe_names: Sequence[str] | None = None,
    backbones: Sequence[str] = (),
) -> list[Choice]:
    """Return what to try: every method on every backbone first, then other recipes and rates.

    The floor is always there, on every backbone, and once, as it takes no step. Without rates a
    recipe is tried at its own, and each method's first one at a third and three times that; a
    paper's recipe keeps its rate. Raises ConfigError for an unknown method or recipe, and for a
    method that has none of the recipes.
    """
    table = methods.table()
    for name in names or ():
        if name not in table:
            raise ConfigError(f"method {name!r}: no such method", nearest(name, table))
    for word in recipe_names or ():
        if word not in recipes.NAMES:
            hint = nearest(word, recipes.NAMES)
            raise ConfigError(f"recipe {word!r}: no such recipe", hint)
    tried = names or recipes.suggested()
    by_method = {
        name: _recipes_and_rates(name, rates, recipe_names)
        for name in dict.fromkeys([methods.FLOOR, *tried])
    }
    for name in names or ():
        if not by_method[name]:
            known = ", ".join(recipes.recipes_of(table[name]))
            what = f"--recipes {','.join(recipe_names or ())}: {name} has none of them"
            raise ConfigError(what, f"it has {known}; give one, or other --methods")
    # Everything once before anything again: the budget may end anywhere.
    return [
        Choice(name, pair[1], pair[0], backbone, backbone_name)
        for turn in zip_longest(*by_method.values())
        for backbone, backbone_name in _named(backbones)
        for name, pair in zip(by_method, turn, strict=True)
        if pair is not None
    ]


def _recipes_and_rates(
    method: str, rates: Sequence[float] | None, recipe_names: Sequence[str] | None
) -> list[tuple[str, float]]:
    """Return a method's recipes with the rates to try them at, in turn."""
    entry = methods.get(method)
    known = recipes.recipes_of(entry)
    if entry.method.has_closed_form:
        return [(recipes.DEFAULT, entry.learning_rate)]
    asked = recipe_names or known
    if recipes.is_for_few_labels(entry):
        asked = [recipes.DEFAULT if name == recipes.FEW else name for name in asked]
    tried = [name for name in dict.fromkeys(asked) if name in known]
    ours = [name for name in tried if name != recipes.PUBLISHED]
    plain = [(name, recipes.rate_of(entry, name)) for name in tried]
    if rates is None or not rates:
        return plain + [
            (name, float(f"{entry.learning_rate * factor:.2g}"))
            for name in ours[:1]
            for factor in FACTORS
        ]
    paper = [pair for pair in plain if pair[0] == recipes.PUBLISHED]
    first, *more = dict.fromkeys(rates)
    turns = [[*((name, first) for name in ours), *paper]]
    turns += [[(name, rate) for name in ours] for rate in more]
    return [pair for turn in turns for pair in turn]


def _named(backbones: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Return backbones with what they are called: the last part of a path, where that tells."""
    if not backbones:
        return [(None, None)]
    short = [Path(backbone).name for backbone in backbones]
    is_clear = len(set(short)) == len(short)
    return list(zip(backbones, short if is_clear else backbones, strict=True))


def make_candidates(
    tried: Sequence[Choice], experiment_of: Callable[[Choice], Experiment]
) -> list[Candidate]:
    """Return a candidate for each choice, of which nothing is known yet."""
    return [Candidate(choice, experiment_of(choice)) for choice in tried]
