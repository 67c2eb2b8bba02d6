"""What a prepared directory says of itself: source, rows, hashes, labels, lengths."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unipelt_cli.config.sections import MOST_FOLDS, DataSettings
from unipelt_cli.data.sources import SourceRows
from unipelt_cli.metrics import CLASSIFICATION_METRICS, REGRESSION_METRICS
from unipelt_cli.tasks import Task, joint_positive

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
FORMAT = 1
SPLITS = ("train", "dev", "test")
MANIFEST = "manifest.json"


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
    dev: _Split | None = None
    test: _Split | None = None


class _Leakage(_Part):
    train_dev: Count | None = None
    train_test: Count | None = None
    dev_test: Count | None = None


class _Manifest(_Part):
    format: Count
    task: Annotated[str, Field(min_length=1)]
    text: Annotated[list[str], Field(min_length=1, max_length=2)]
    labels: list[str]
    metric: str
    also: list[str]
    positive: str | None = None
    decimal_comma: bool = False
    source: dict[str, Any]
    k: Size | None
    data_seed: Count
    dev_size: Count
    folds: Annotated[int, Field(ge=2, le=MOST_FOLDS)] | None = None
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
        if self.positive is not None and (
            len(self.labels) != 2 or self.positive not in self.labels
        ):
            raise ValueError(f"positive = {self.positive[:60]!r}: not one of two labels")
        names = set(self.labels) or {"min", "mean", "max"}
        by_name = dict(self.splits)
        lacking = {"dev": self.dev_size and not self.folds, "test": not self.folds}
        for name, is_needed in lacking.items():
            if is_needed and by_name[name] is None:
                raise ValueError(f"splits: no {name}")
        for name, split in self.splits:
            if split is None and name not in self.splits.model_fields_set:
                continue
            if split is None:
                raise ValueError(f"splits.{name}: not a split")
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


def digest_rows(rows: Dataset) -> str:
    """Return the sha256 of the rows' content in their order: all columns but "row"."""
    names = [name for name in rows.column_names if name != "row"]
    cells = rows.with_format(None)[:]
    total = hashlib.sha256(json.dumps(names).encode())
    for row in zip(*(cells[name] for name in names), strict=True):
        total.update(b"\n" + json.dumps(row, ensure_ascii=False).encode())
    return total.hexdigest()


def make_manifest(
    source: SourceRows, settings: DataSettings, splits: Mapping[str, Dataset], notes: Sequence[str]
) -> Mapping[str, Any]:
    """Record what was drawn and what is odd about it: the same settings give the same bytes.

    Of splits that there are not, such as a dev set of no rows, nothing is recorded.
    """
    task = source.task
    content = {
        "format": FORMAT,
        "task": task.name,
        "text": list(task.text),
        "labels": list(task.labels),
        "metric": task.metric,
        "also": list(task.also),
        **joint_positive([task]),
        **({"decimal_comma": True} if task.decimal_comma else {}),
        "source": source.source,
        "k": settings.k,
        "data_seed": settings.data_seed,
        "dev_size": settings.dev_size,
        **({"folds": settings.folds} if settings.folds else {}),
        **describe_splits(task, splits),
        "notes": list(notes),
    }
    return seal_manifest(content)


def describe_splits(task: Task, splits: Mapping[str, Dataset]) -> Mapping[str, Any]:
    """Record each split, the texts that two of them hold, and those with more labels than one."""
    keys = {split: text_keys(task, rows) for split, rows in splits.items()}
    seen = {split: set(of_split) for split, of_split in keys.items()}
    labelled: set[tuple[tuple[str, ...], float]] = set()
    for split, rows in splits.items():
        labelled.update(zip(keys[split], rows[:]["label"], strict=True))
    pairs = combinations([split for split in SPLITS if split in splits], 2)
    return {
        "splits": {split: _describe(task, splits[split], keys[split]) for split in splits},
        "leakage": {f"{a}_{b}": sum(key in seen[a] for key in keys[b]) for a, b in pairs},
        "conflicts": sum(count > 1 for count in Counter(key for key, _ in labelled).values()),
    }


def _describe(task: Task, rows: Dataset, keys: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    labels: list[float] = rows[:]["label"]
    words = [sum(len(text.split()) for text in key) for key in keys]
    quantiles = np.quantile(words, (0, 0.25, 0.5, 0.75, 0.95, 1), method="lower").tolist()
    counts = Counter(labels)
    summary: dict[str, float] = {name: counts[index] for index, name in enumerate(task.labels)}
    if task.is_regression:
        mean = math.fsum(labels) / len(labels)
        summary = {"min": min(labels), "mean": mean, "max": max(labels)}
    return {
        "rows": len(rows),
        "digest": digest_rows(rows),
        "row_ids": rows[:]["row"],
        "labels": summary,
        "words": dict(zip(("min", "p25", "p50", "p75", "p95", "max"), quantiles, strict=True)),
        "duplicates": len(keys) - len(set(keys)),
    }


def text_keys(task: Task, rows: Dataset) -> list[tuple[str, ...]]:
    """Return each row's texts without case and spacing, to find equal ones."""
    cells = rows[:]
    columns = ([" ".join(text.casefold().split()) for text in cells[name]] for name in task.text)
    return list(zip(*columns, strict=True))


def seal_manifest(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the manifest's own checksum, so that a damaged or edited one is told."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(dumps(content)).hexdigest()}


def dumps(manifest: Mapping[str, Any]) -> bytes:
    """Write a manifest as JSON, the same bytes for the same content."""
    text = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    # A path that is not UTF-8 holds lone surrogates; these are JSON's own escapes for them.
    return text.encode("utf-8", "backslashreplace")
