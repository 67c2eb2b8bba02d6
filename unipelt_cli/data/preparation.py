"""From a source of labelled rows to three splits, and a manifest that says what they hold.

Whatever the source, its train rows pass the same draw, so that the same settings always give the
same bytes. `save` writes what was prepared as one Arrow stream for each split beside the manifest;
`load` checks it by its hashes. Rows to evaluate are read here too.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from unipelt_cli.config.experiment import DataSettings
from unipelt_cli.data import parquet
from unipelt_cli.data.cells import LARGEST_VALUE, as_dataset, encode_labelled
from unipelt_cli.data.manifest import check_manifest
from unipelt_cli.data.readers import read_file
from unipelt_cli.data.sources import Found, find, glue_root, with_metric
from unipelt_cli.data.text_lines import read_bytes
from unipelt_cli.errors import DataError, reason, short
from unipelt_cli.files import atomic
from unipelt_cli.files.strict import parse_json
from unipelt_cli.tasks import REGRESSION_METRICS, TASKS, Task

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "dev", "test")
LARGEST_TEST = 1000
GIVE_PREPARED = "give a directory that `unipelt prepare` wrote"


@dataclass(frozen=True)
class Prepared:
    """A resolved task, its rows as "train", "dev" and "test", and what is recorded of them.

    Columns: the task's text columns (str), "label" (int64 index; float64 value in regression) and
    "row" (int64, the row's place in its source, from 0).
    """

    task: Task
    splits: Mapping[str, Dataset]
    manifest: dict[str, Any]


def prepare(settings: DataSettings) -> Prepared:
    """Find the rows that `settings` name and draw the three splits.

    Raises DataError for a source that cannot be read, rows that cannot be used or too few rows,
    and ConfigError for an unknown task.
    """
    datasets.disable_progress_bars()
    assert not isinstance(settings.prepared, tuple)
    directory = Path(settings.prepared) if settings.prepared else glue_root(settings)
    if directory and (settings.prepared or _has_manifest(directory)):
        return _reopen(directory, settings)
    found = find(settings)
    found = replace(found, task=with_metric(found.task, settings.metric))
    splits, notes = _draw(found, settings)
    return Prepared(found.task, splits, _manifest(found, settings, splits, notes))


def prepare_each(settings: DataSettings) -> tuple[Prepared, ...]:
    """Prepare every task that `settings` name, each as if it were alone.

    Raises DataError as `prepare` does, and for tasks that cannot be trained and scored together.
    """
    found = tuple(prepare(alone) for alone in settings.each())
    _check_together([prepared.manifest for prepared in found])
    return found


def read_drawn(settings: DataSettings) -> list[dict[str, Any]]:
    """Return the manifests of the prepared directories that `settings` name, without the rows.

    Raises DataError as `prepare_each` does, but for what is wrong with the rows.
    """
    manifests = []
    for alone in settings.each():
        assert isinstance(alone.prepared, str)
        manifest = _read_manifest(Path(alone.prepared))
        manifests.append(_asked_for(manifest, _task_of(manifest), Path(alone.prepared), alone)[1])
    _check_together(manifests)
    return manifests


def _check_together(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError for tasks that cannot be trained and scored together."""
    names = [manifest["task"] for manifest in manifests]
    for name, manifest in zip(names[1:], manifests[1:], strict=True):
        if names.count(name) > 1:
            hint = "prepare own rows under other names, with --task NAME"
            raise DataError(f"two of the tasks are called {name!r}", hint)
        for key in ("k", "data_seed", "dev_size"):
            asked, there = manifests[0][key], manifest[key]
            if asked != there:
                what = f"{names[0]} was drawn with {asked}, {name} with {there}"
                raise DataError(f"data.{key}: {what}", "prepare all tasks with the same settings")
    for name, manifest in zip(names, manifests, strict=True):
        if len(manifests) > 1 and manifest["metric"] == "mse":
            what = f"the metric of {name} is 'mse', which no mean can hold"
            hint = f"choose one of {', '.join(REGRESSION_METRICS[:-1])}"
            raise DataError(f"data.metric: {what}", hint)


def joint_manifest(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Return what is recorded of a run's rows: one task's manifest, or those of several by name."""
    if len(prepared) == 1:
        return prepared[0].manifest
    return {"tasks": {own.task.name: own.manifest for own in prepared}}


def labelled_rows(path: Path, task: Task, label: str, kind: str | None = None) -> Iterator[Dataset]:
    """Read a file of any size as rows of a task, a window at a time.

    Columns are those of a split, labels by the task's names. Raises DataError for a file that
    cannot be read, a missing column, a missing or empty text, and a label that the task lacks.
    """
    for cells in read_file(path, (*task.text, label), kind):
        yield encode_labelled(cells, task, task.text, label)


def digest(rows: Dataset) -> str:
    """Return the sha256 of the rows' content in their order: all columns but "row"."""
    names = [name for name in rows.column_names if name != "row"]
    cells = rows.with_format(None)[:]
    total = hashlib.sha256(json.dumps(names).encode())
    for row in zip(*(cells[name] for name in names), strict=True):
        total.update(b"\n" + json.dumps(row, ensure_ascii=False).encode())
    return total.hexdigest()


def save(prepared: Prepared, directory: Path) -> None:
    """Write a prepared directory, whole or not at all; parents are made.

    Raises RunError when it exists already or cannot be written.
    """
    with atomic.new_directory(directory) as temporary:
        for split, rows in prepared.splits.items():
            table = rows.with_format("arrow")[:].replace_schema_metadata(None).combine_chunks()
            path = str(temporary / f"{split}.arrow")
            with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        (temporary / MANIFEST).write_bytes(_dumps(prepared.manifest))


def load(directory: Path) -> Prepared:
    """Read what `save` wrote, and check it by its hashes.

    Raises DataError when it is absent, foreign, of a newer format, or damaged.
    """
    manifest = _read_manifest(directory)
    task, recorded = _task_of(manifest), manifest["splits"]
    splits = {split: _read_split(directory, split, task, recorded[split]) for split in SPLITS}
    return Prepared(task, splits, manifest)


def _task_of(manifest: Mapping[str, Any]) -> Task:
    name, labels, text = manifest["task"], tuple(manifest["labels"]), tuple(manifest["text"])
    task = Task(name, text, labels, manifest["metric"], tuple(manifest["also"]))
    known = TASKS.get(name)
    if known and (known.text, known.labels) == (text, labels):
        task = replace(known, metric=task.metric, also=task.also)
    return task


def _draw(found: Found, settings: DataSettings) -> tuple[dict[str, Dataset], list[str]]:
    """Shuffle the train rows by the data seed and cut them: test (if none), train, dev.

    Without k, dev is cut before train, which is all the rest.
    """
    rows, k, name = len(found.rows["train"]), settings.k, found.task.name
    carves_dev = "dev" not in found.rows
    fifth = max(1, rows // 5)
    test = 0 if "test" in found.rows else min(LARGEST_TEST, fifth)
    left = rows - test
    most = left - carves_dev
    if most < 1:
        raise DataError(f"{name}: too few rows ({rows})", "give at least 3 labelled rows")
    if k is not None and k > most:
        held = f", {test} of them held for test" if test else ""
        reserved = ", which leaves one row for dev" if carves_dev else ""
        raise DataError(
            f"data.k = {k}: {name} has {rows} train rows{held}",
            f"the largest usable k is {most}{reserved}",
        )
    largest = left - k if k is not None else fifth if found.own else max(1, left // 2)
    dev = min(settings.dev_size, largest) if carves_dev else 0
    first = test if k is None else test + k
    places = {
        "train": range(test + dev, rows) if k is None else range(test, first),
        "dev": range(first, first + dev),
        "test": range(test),
    }
    shuffled = found.rows["train"].shuffle(seed=settings.data_seed, keep_in_memory=True)
    splits = {
        split: _part(shuffled, places[split]) if places[split] else found.rows[split]
        for split in SPLITS
    }
    _check_classes(found.task, splits["train"], k)
    unseen = _unseen_labels(found.task, splits)
    return splits, [*found.notes, *_notes(settings, test, dev), *unseen]


def _part(rows: Dataset, places: range) -> Dataset:
    return as_dataset(rows.select(places, keep_in_memory=True).with_format("arrow")[:])


def _notes(settings: DataSettings, test: int, dev: int) -> Iterator[str]:
    """Say in sentences what the draw did that its settings alone do not tell."""
    if test:
        yield f"test: the first {test} of the shuffled train rows (20 %, at most {LARGEST_TEST})"
    if dev and settings.k is None:
        yield f"dev: the {'next' if test else 'first'} {dev} of the shuffled rows; train: the rest"
    if 0 < dev < settings.dev_size:
        yield f"dev: {dev} rows instead of {settings.dev_size}, because there are too few"


def _unseen_labels(task: Task, splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Say which labels dev and test ask for that training never shows."""
    if task.is_regression:
        return
    drawn = set(splits["train"][:]["label"])
    for split in SPLITS[1:]:
        unseen = Counter(label for label in splits[split][:]["label"] if label not in drawn)
        if unseen:
            count, names = unseen.total(), [short(task.labels[label]) for label in sorted(unseen)]
            listed = ", ".join([*names[:20], *(["..."] if len(names) > 20 else [])])
            rows = f"{count} rows have" if count > 1 else "1 row has"
            labels = "labels" if len(names) > 1 else "a label"
            yield f"{split}: {rows} {labels} that no train row has: {listed}"


def _check_classes(task: Task, train: Dataset, k: int | None) -> None:
    drawn = set(train[:]["label"])
    if not task.is_regression and len(drawn) == 1:
        setting = "data.k is not set" if k is None else f"data.k = {k}"
        label = short(task.labels[drawn.pop()])
        if len(task.labels) == 1:
            raise DataError(
                f"{task.name}: every row has the label {label}",
                "give rows of at least two classes, or another column with --label",
            )
        raise DataError(
            f"{setting}: every train row of {task.name} has the label {label}",
            "give rows of at least two classes: a larger --k, another --data-seed or other data",
        )


def _manifest(
    found: Found, settings: DataSettings, splits: Mapping[str, Dataset], notes: Sequence[str]
) -> dict[str, Any]:
    """Record what was drawn and what is odd about it: the same settings give the same bytes."""
    task = found.task
    keys = {split: _keys(task, rows) for split, rows in splits.items()}
    seen = {split: set(keys[split]) for split in SPLITS}
    pairs = (("train", "dev"), ("train", "test"), ("dev", "test"))
    labelled: set[tuple[tuple[str, ...], float]] = set()
    for split, rows in splits.items():
        labelled.update(zip(keys[split], rows[:]["label"], strict=True))
    content = {
        "format": FORMAT,
        "task": task.name,
        "text": list(task.text),
        "labels": list(task.labels),
        "metric": task.metric,
        "also": list(task.also),
        "source": found.source,
        "k": settings.k,
        "data_seed": settings.data_seed,
        "dev_size": settings.dev_size,
        "splits": {split: _describe(task, splits[split], keys[split]) for split in SPLITS},
        "leakage": {f"{a}_{b}": sum(key in seen[a] for key in keys[b]) for a, b in pairs},
        "conflicts": sum(count > 1 for count in Counter(key for key, _ in labelled).values()),
        "notes": list(notes),
    }
    return _sealed(content)


def _describe(task: Task, rows: Dataset, keys: Sequence[tuple[str, ...]]) -> dict[str, Any]:
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
        "digest": digest(rows),
        "row_ids": rows[:]["row"],
        "labels": summary,
        "words": dict(zip(("min", "p25", "p50", "p75", "p95", "max"), quantiles, strict=True)),
        "duplicates": len(keys) - len(set(keys)),
    }


def _keys(task: Task, rows: Dataset) -> list[tuple[str, ...]]:
    """Return each row's texts without case and spacing, to find equal ones."""
    cells = rows[:]
    columns = ([" ".join(text.casefold().split()) for text in cells[name]] for name in task.text)
    return list(zip(*columns, strict=True))


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add the manifest's own checksum, so that a damaged or edited one is told."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(_dumps(content)).hexdigest()}


def _dumps(manifest: Mapping[str, Any]) -> bytes:
    text = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    # A path that is not UTF-8 holds lone surrogates; these are JSON's own escapes for them.
    return text.encode("utf-8", "backslashreplace")


def _reopen(directory: Path, settings: DataSettings) -> Prepared:
    """Load a prepared directory; it must be what the settings ask for, where they ask."""
    prepared = load(directory)
    task, manifest = _asked_for(prepared.manifest, prepared.task, directory, settings)
    return Prepared(task, prepared.splits, manifest)


def _asked_for(
    manifest: Mapping[str, Any], task: Task, directory: Path, settings: DataSettings
) -> tuple[Task, dict[str, Any]]:
    """Return a prepared task and its manifest with the metric that the settings ask for."""
    asked: dict[str, str | int | None] = {"task": settings.task, "k": settings.k}
    if "data_seed" in settings.model_fields_set:
        asked["data_seed"] = settings.data_seed
    for key, value in asked.items():
        recorded = manifest[key]
        if value is not None and value != recorded:
            was = "all rows" if recorded is None else repr(recorded)
            hint = f"leave out --{key.replace('_', '-')}, or prepare the data again"
            raise DataError(f"data.{key} = {value!r}: {directory} was prepared with {was}", hint)
    task = with_metric(task, settings.metric)
    metrics = {"metric": task.metric, "also": list(task.also)}
    return task, _sealed({**manifest, **metrics})


def _read_split(directory: Path, split: str, task: Task, recorded: Mapping[str, Any]) -> Dataset:
    name = f"{split}.arrow"
    label = pa.float64() if task.is_regression else pa.int64()
    columns = [*((text, pa.string()) for text in task.text), ("label", label), ("row", pa.int64())]
    content = _read_file(directory, name)
    try:
        table = parquet.read_stream(content, pa.schema(columns))
        _check_cells(table, task)
        rows = as_dataset(table)
        found = (digest(rows), rows[:]["row"])
    except parquet.ERRORS as error:
        _damaged(directory, f"{name}: {reason(error)}", error)
    if found != (recorded["digest"], recorded["row_ids"]):
        _damaged(directory, f"{name} does not hold the rows of {MANIFEST}")
    return rows


def _check_cells(table: pa.Table, task: Task) -> None:
    """Raise ValueError for cells that no checked row has: missing ones, labels out of range."""
    if any(column.null_count for column in table.columns):
        raise ValueError("cells are missing")
    label = table["label"]
    if task.is_regression:
        # Not the other way round: NaN is neither larger nor smaller.
        if not pc.all(pc.less_equal(pc.abs(label), LARGEST_VALUE)).as_py():
            raise ValueError("a label is not finite")
    elif not pc.all(pc.and_(pc.greater_equal(label, 0), pc.less(label, task.outputs))).as_py():
        raise ValueError(f"a label is none of {task.outputs}")


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not _has_manifest(directory):
        raise DataError(f"{directory}: not a prepared directory (no {MANIFEST})", GIVE_PREPARED)
    content = _read_file(directory, MANIFEST)
    try:
        found = parse_json(content)
        intact = isinstance(found, dict) and found == _sealed(found)
    except ValueError as error:
        _damaged(directory, f"{MANIFEST}: {reason(error)}", error)
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise DataError(f"{directory}: its {MANIFEST} is not one of unipelt's", GIVE_PREPARED)
    if found["format"] != FORMAT:
        raise DataError(
            f"{directory}: format {found['format']}, but this version reads format {FORMAT}",
            "update unipelt, or prepare the data again",
        )
    if not intact:
        _damaged(directory, f"{MANIFEST} was changed")
    try:
        check_manifest(found)
    except ValueError as error:
        _damaged(directory, f"{MANIFEST}: {reason(error)}", error)
    return found


def _read_file(directory: Path, name: str) -> bytes:
    """Read a file of a prepared directory; a link is never followed out of it."""
    path = directory / name
    try:
        is_inside = path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError) as error:
        _damaged(directory, f"{name}: {reason(error)}", error)
    if not is_inside:
        raise DataError(f"{path}: a link out of the directory", "put the file itself there")
    return read_bytes(path, (path.suffix,))


def _has_manifest(directory: Path) -> bool:
    try:
        return (directory / MANIFEST).is_file()
    except OSError as error:
        hint = "check the path and its rights"
        raise DataError(f"{directory}: {reason(error)}", hint) from error


def _damaged(directory: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise DataError(f"{directory}: damaged ({what})", "prepare the data again") from cause
