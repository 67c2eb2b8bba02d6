"""What reading relies on in a run's JSON: other keys may be there, these must be, and be right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from unipelt_cli.config.sections import Metric
from unipelt_cli.errors import RunError
from unipelt_cli.files.sealed import REMEDY


class _Split(BaseModel):
    digest: str


class _Splits(BaseModel):
    train: _Split
    dev: _Split = _Split(digest="")  # of a run without dev rows nothing is recorded
    test: _Split = _Split(digest="")  # nor of one that was tested on folds


class _Data(BaseModel):
    splits: _Splits


class _StartedOn(BaseModel):
    name: str
    revision: str | None
    fingerprint: str
    files: dict[str, str]


class Started(BaseModel):
    """What going on with an interrupted run relies on in environment.json."""

    backbone: _StartedOn


class Environment(Started):
    """What reading relies on in environment.json."""

    data: _Data
    threads: int = Field(ge=1, le=4096)
    packages: dict[str, str]


class _JointData(BaseModel):
    tasks: dict[str, _Data] = Field(min_length=2)


class JointEnvironment(Environment):
    """What reading relies on in environment.json where several tasks trained one model."""

    data: _JointData  # type: ignore[assignment]


class _Files(BaseModel):
    experiment: str = Field(alias="experiment.toml")
    environment: str = Field(alias="environment.json")
    probe: str = Field(alias="probe.safetensors")
    metrics: str = Field(alias="metrics.jsonl")
    model: str = Field(alias="model.safetensors")
    predictions: str = Field("", alias="predictions.safetensors")


class Floor(BaseModel):
    """What reading relies on in the scores of the floor of all methods on a run's rows."""

    dev: dict[str, float] = Field(default_factory=dict)
    test: dict[str, float]


_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Fold(BaseModel):
    rows: int
    test: dict[str, float]


class Folds(BaseModel):
    """What reading relies on in the folds of a run's train rows."""

    count: int
    rows: int
    mean: dict[str, float]
    spread: dict[str, float]
    interval: _Interval | None
    each: list[_Fold]


class Result(BaseModel):
    """What reading relies on in result.json."""

    metric: str
    dev: dict[str, float]
    test: dict[str, float]
    seconds: float
    device: str
    best_epoch: int
    epochs: int
    trainable_parameters: int
    stored_parameters: int
    head_parameters: int
    artifact_bytes: int
    peak_memory_bytes: int
    collapsed: bool
    sha256: str
    files: _Files
    probe: Floor | None = None
    """Of runs of earlier versions, and of the floor's own, there is none."""
    selection: Literal["dev", "schedule"] = "dev"
    tested_on: Literal["test", "folds"] = "test"
    interval: _Interval | None = None
    folds: Folds | None = None
    together: int = 1
    """How many runs shared their passes."""
    against_mean: dict[str, dict[str, float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_scored(self) -> Self:
        selected = self.metric in self.dev or self.selection == "schedule"
        tests = [self.test, *([] if self.probe is None else [self.probe.test])]
        if not selected or any(self.metric not in scores for scores in tests):
            raise ValueError(f"no {self.metric!r} among the scores")
        if (self.tested_on == "folds") != (self.folds is not None):
            raise ValueError("tested_on and folds contradict each other")
        return self


class _LabelScale(BaseModel):
    mean: float = Field(allow_inf_nan=False)
    deviation: float = Field(ge=0, allow_inf_nan=False)


class _Task(BaseModel):
    name: str
    text: list[str] = Field(min_length=1, max_length=2)
    labels: list[str]
    metric: Metric
    also: list[Metric]
    positive: str | None = None
    decimal_comma: bool = False
    label_scale: _LabelScale | None = None

    @model_validator(mode="after")
    def _is_scored_on_a_label(self) -> Self:
        is_one = len(self.labels) == 2 and self.positive in self.labels
        if self.positive is not None and not is_one:
            raise ValueError("positive is not one of two labels")
        return self


class State(BaseModel):
    """What going on relies on in the header of state.safetensors."""

    counters: Mapping[str, Any]
    seconds: float = Field(ge=0)


class Header(BaseModel):
    """What reading relies on in the header of model.safetensors."""

    task: _Task


class JointHeader(BaseModel):
    """What reading relies on in that header where several tasks trained one model."""

    tasks: list[_Task] = Field(min_length=2)


def shaped(path: Path, value: Mapping[str, Any], schema: type[BaseModel]) -> Mapping[str, Any]:
    """Return a JSON object that has what reading relies on; raise RunError for another."""
    try:
        schema.model_validate(value, strict=True)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise RunError(f"{path}: damaged, {where}: {first['msg'].lower()}", REMEDY) from None
    return value
