"""Scores that others have printed, shipped as data: what runs are compared against."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unipelt_cli.config.presets import preset_folder
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.files.strict import parse_toml

NAMES = ("paper",)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Row(_Part):
    """A method's scores at one k, in percent and in the order of the tasks."""

    k: int | Literal["all"]
    method: str
    means: list[float]
    deviations: list[float] | None = None
    average: float
    average_deviation: float | None = None


class Costs(_Part):
    """What a method stores (numbers), and its times in percent of the reference method's."""

    method: str
    parameters: int
    train_time: int
    inference_time: int


class Table(_Part):
    """All that one publication prints: tables of scores, and costs."""

    name: str
    backbone: str
    costs_relative_to: str
    tasks: list[str]
    rows: list[Row] = Field(min_length=1)
    costs: list[Costs]

    @model_validator(mode="after")
    def _is_whole(self) -> "Table":
        for row in self.rows:
            for values in (row.means, row.deviations):
                if values is not None and len(values) != len(self.tasks):
                    raise ValueError(f"{row.method} at k = {row.k}: not one score a task")
        return self

    def score(self, task: str, k: int | None, method: str) -> "Score | None":
        """Return the fractions printed for a cell, or None; k None is all rows."""
        row = self._row(k, method)
        if row is None or task not in self.tasks:
            return None
        task_index = self.tasks.index(task)
        deviation = row.deviations[task_index] / 100 if row.deviations else None
        return Score(row.means[task_index] / 100, deviation)

    def average(self, k: int | None, method: str) -> float | None:
        """Return the average over the tasks that is printed, as a fraction, or None."""
        row = self._row(k, method)
        return None if row is None else row.average / 100

    def _row(self, k: int | None, method: str) -> Row | None:
        wanted = ("all" if k is None else k, method)
        return next((row for row in self.rows if (row.k, row.method) == wanted), None)


@dataclass(frozen=True)
class Score:
    """A printed score as a fraction, and its standard deviation over seeds if there were some."""

    mean: float
    deviation: float | None


def read_published(name: str) -> Table:
    """Return the shipped tables called `name`; raise ConfigError with the names that there are."""
    if name not in NAMES:
        raise ConfigError(f"--against {name!r}: no such published scores", nearest(name, NAMES))
    path = preset_folder() / "published" / f"{name}.toml"
    return Table.model_validate(parse_toml(path.read_text(encoding="utf-8")))
