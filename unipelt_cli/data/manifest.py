"""What a prepared directory's manifest must hold, whoever wrote it and its checksum.

A checksum tells damage, not intent: a stranger can recompute it over whatever he likes.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unipelt_cli.tasks import CLASSIFICATION_METRICS, REGRESSION_METRICS

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Words(_Part):
    min: Count
    p25: Count
    p50: Count
    p75: Count
    p95: Count
    max: Count


class _Split(_Part):
    rows: Size
    digest: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    row_ids: list[Count]
    labels: dict[str, int | float]
    words: _Words
    duplicates: Count


class _Splits(_Part):
    train: _Split
    dev: _Split
    test: _Split


class _Leakage(_Part):
    train_dev: Count
    train_test: Count
    dev_test: Count


class _Manifest(_Part):
    format: Count
    task: Annotated[str, Field(min_length=1)]
    text: Annotated[list[str], Field(min_length=1, max_length=2)]
    labels: list[str]
    metric: str
    also: list[str]
    source: dict[str, Any]
    k: Size | None
    data_seed: Count
    dev_size: Size
    splits: _Splits
    leakage: _Leakage
    conflicts: Count
    notes: list[str]
    checksum: str

    @model_validator(mode="after")
    def _agree(self) -> "_Manifest":
        metrics = CLASSIFICATION_METRICS if self.labels else REGRESSION_METRICS
        if len({*self.text, "label", "row"}) < len(self.text) + 2:
            raise ValueError(f"text = {self.text}: each column needs its own name")
        if self.labels and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError("labels: not two or more different ones")
        if not {self.metric, *self.also} <= set(metrics):
            raise ValueError(f"metric, also = {[self.metric, *self.also]}: not all of {metrics}")
        names = set(self.labels) or {"min", "mean", "max"}
        for name, split in self.splits:
            if split.rows != len(split.row_ids):
                raise ValueError(f"splits.{name}: {split.rows} rows, {len(split.row_ids)} row_ids")
            if split.labels.keys() != names:
                raise ValueError(f"splits.{name}.labels: not those of the task")
        return self


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and its value, for what `prepare` never writes."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        message = error["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, error["loc"]))[:100]
        if not where:
            raise ValueError(message[:200]) from None
        if error["type"] in ("missing", "extra_forbidden"):
            raise ValueError(f"{where}: {message}") from None
        raise ValueError(f"{where} = {repr(error['input'])[:60]}: {message}") from None
