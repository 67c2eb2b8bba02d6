"""From a source of labelled rows to three splits, and a manifest that says what they hold.

Sources: GLUE's directory layout, the hub, files of the user's own, the packaged demo, and
directories that `save` wrote. Whatever the source, its cells pass the same checks and its train
rows the same draw, so that the same settings always give the same bytes.
"""

import csv
import hashlib
import io
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset

from unipelt_cli.config import DataSettings
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import (
    CLASSIFICATION_METRICS,
    REGRESSION_METRICS,
    TASKS,
    Glue,
    Packaged,
    Task,
    get_task,
    own_metric,
)

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "dev", "test")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
HUB_GLUE = "nyu-mll/glue"
LARGEST_TEST = 1000
# Far inside float32's range, so that squares of labels and their sums stay finite.
LARGEST_VALUE = 1e15
FILL_IN = "fill it in, or drop the row"
GIVE_ROWS = "give a file with labelled rows"
GIVE_PREPARED = "give a directory that `unipelt prepare` wrote"

# Columns: the task's text columns (str), "label" (int64 index; float64 value in regression) and
# "row" (int64, the row's place in its source, from 0).
Rows = Dataset


@dataclass(frozen=True)
class Prepared:
    """A resolved task, its rows as "train", "dev" and "test", and what is recorded of them."""

    task: Task
    splits: Mapping[str, Dataset]
    manifest: dict[str, Any]


def prepare(settings: DataSettings) -> Prepared:
    """Find the rows that `settings` name and draw the three splits.

    Raises DataError for a source that cannot be read, rows that cannot be used or too few rows,
    and ConfigError for an unknown task.
    """
    datasets.disable_progress_bars()
    if settings.prepared:
        return _reopen(Path(settings.prepared), settings)
    if settings.train_file:
        found = _own_files(settings, settings.train_file)
    elif settings.dataset:
        found = _own_hub(settings, settings.dataset)
    else:
        task = get_task(settings.task or "")
        source = settings.source or os.environ.get("UNIPELT_DATA") or "hub"
        if not isinstance(task.source, Glue):
            found = _packaged(task)
        elif source == "hub":
            found = _glue_hub(task, task.source)
        elif _has_manifest(Path(source)):
            return _reopen(Path(source), settings)
        else:
            found = _glue_directory(task, task.source, Path(source))
    task = _with_metric(found.task, settings.metric)
    splits, notes = _draw(found, settings)
    return Prepared(task, splits, _manifest(task, found.source, settings, splits, notes))


def read_rows(path: Path, columns: Sequence[str]) -> Dataset:
    """Read the named text columns of a CSV, TSV, JSONL or Parquet file, and "row".

    Raises DataError for a file that cannot be read, a missing column, a missing or empty text.
    """
    return _encode(_read(path), columns, columns)


def labelled_rows(path: Path, prepared_task: Task, label_column: str) -> Dataset:
    """Read a file as rows of a task: columns as in a split, labels by the task's names.

    Raises DataError as `read_rows` does, and for a label that the task does not have.
    """
    return _labelled(_read(path), prepared_task, prepared_task.text, label_column)


def digest(rows: Dataset) -> str:
    """Return the sha256 of the rows' content in their order: all columns but "row"."""
    names = [name for name in rows.column_names if name != "row"]
    cells = rows.with_format(None)[:]
    total = hashlib.sha256(json.dumps(names).encode())
    for row in zip(*(cells[name] for name in names), strict=True):
        total.update(b"\n" + json.dumps(row, ensure_ascii=False).encode())
    return total.hexdigest()


# The draw and its record


@dataclass(frozen=True)
class _Found:
    """What a source offers before the draw: checked rows, by split; dev or test may lack."""

    task: Task
    source: dict[str, Any]
    rows: Mapping[str, Dataset]
    notes: tuple[str, ...] = ()
    own: bool = False


def _draw(found: _Found, settings: DataSettings) -> tuple[dict[str, Dataset], list[str]]:
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
    drawn = {split: _part(shuffled, places[split]) for split in SPLITS if places[split]}
    _check_classes(found.task, drawn["train"], k)
    splits = {split: drawn[split] if split in drawn else found.rows[split] for split in SPLITS}
    return splits, [*found.notes, *_notes(settings, test, dev)]


def _part(rows: Dataset, places: range) -> Dataset:
    return _dataset(rows.select(places, keep_in_memory=True).with_format("arrow")[:])


def _dataset(table: pa.Table) -> Dataset:
    """Wrap a table; a random fingerprint spares hashing it, and nothing here is cached by it."""
    return Dataset(table.combine_chunks(), fingerprint=uuid.uuid4().hex[:16])


def _notes(settings: DataSettings, test: int, dev: int) -> Iterator[str]:
    """Say in sentences what the draw did that its settings alone do not tell."""
    if test:
        yield f"test: the first {test} of the shuffled train rows (20 %, at most {LARGEST_TEST})"
    if dev and settings.k is None:
        yield f"dev: the {'next' if test else 'first'} {dev} of the shuffled rows; train: the rest"
    if 0 < dev < settings.dev_size:
        yield f"dev: {dev} rows instead of {settings.dev_size}, because there are too few"


def _check_classes(task: Task, train: Dataset, k: int | None) -> None:
    drawn = set(train[:]["label"])
    if not task.is_regression and len(drawn) == 1:
        setting = "data.k is not set" if k is None else f"data.k = {k}"
        label = _short(task.labels[drawn.pop()])
        raise DataError(
            f"{setting}: every train row of {task.name} has the label {label}",
            "give rows of at least two classes: a larger --k, another --data-seed or other data",
        )


def _with_metric(task: Task, metric: str | None) -> Task:
    if metric is None:
        return task
    possible = REGRESSION_METRICS if task.is_regression else CLASSIFICATION_METRICS
    if metric not in possible:
        kind = "regression" if task.is_regression else "classification"
        hint = f"choose one of {', '.join(possible)}"
        raise DataError(f"data.metric = {metric!r}: {task.name} is {kind}", hint)
    also = (name for name in (task.metric, *task.also) if name != metric)
    return replace(task, metric=metric, also=tuple(also))


def _manifest(
    task: Task,
    source: dict[str, Any],
    settings: DataSettings,
    splits: Mapping[str, Dataset],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Record what was drawn and what is odd about it: the same settings give the same bytes."""
    keys = {split: _keys(task, rows) for split, rows in splits.items()}
    labels: dict[tuple[str, ...], set[float]] = {}
    for split, rows in splits.items():
        for key, label in zip(keys[split], rows[:]["label"], strict=True):
            labels.setdefault(key, set()).add(label)
    seen = {split: set(found) for split, found in keys.items()}
    pairs = (("train", "dev"), ("train", "test"), ("dev", "test"))
    content = {
        "format": FORMAT,
        "task": task.name,
        "text": list(task.text),
        "labels": list(task.labels),
        "metric": task.metric,
        "also": list(task.also),
        "source": source,
        "k": settings.k,
        "data_seed": settings.data_seed,
        "dev_size": settings.dev_size,
        "splits": {split: _describe(task, splits[split], keys[split]) for split in SPLITS},
        "leakage": {f"{a}_{b}": sum(key in seen[a] for key in keys[b]) for a, b in pairs},
        "conflicts": sum(len(found) > 1 for found in labels.values()),
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


# The prepared directory: one Arrow stream for each split, and the manifest


def save(prepared: Prepared, directory: Path) -> None:
    """Write a prepared directory, whole or not at all; parents are made.

    Raises DataError when it exists already or cannot be written.
    """
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    try:
        if directory.exists():
            raise DataError(f"{directory}: exists already", "choose another --out, or remove it")
        temporary.mkdir(parents=True)
        for split, rows in prepared.splits.items():
            table = rows.with_format("arrow")[:].replace_schema_metadata(None).combine_chunks()
            path = str(temporary / f"{split}.arrow")
            with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        (temporary / MANIFEST).write_bytes(_dumps(prepared.manifest))
        temporary.rename(directory)
    except (OSError, ValueError) as error:
        hint = "choose another --out, or check the folder's rights and space"
        raise DataError(f"{directory}: cannot be written ({_reason(error)})", hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(directory: Path) -> Prepared:
    """Read what `save` wrote, and check it by its hashes.

    Raises DataError when it is absent, foreign, of a newer format, or damaged.
    """
    manifest = _read_manifest(directory)
    name, labels, text = manifest["task"], tuple(manifest["labels"]), tuple(manifest["text"])
    task = Task(name, text, labels, manifest["metric"], tuple(manifest["also"]))
    known = TASKS.get(name)
    if known and (known.text, known.labels) == (text, labels):
        task = replace(known, metric=task.metric, also=task.also)
    splits = {
        split: _read_split(directory, split, task, manifest["splits"][split]) for split in SPLITS
    }
    return Prepared(task, splits, manifest)


def _read_split(directory: Path, split: str, task: Task, recorded: Mapping[str, Any]) -> Dataset:
    path = directory / f"{split}.arrow"
    label = pa.float64() if task.is_regression else pa.int64()
    columns = [*((name, pa.string()) for name in task.text), ("label", label), ("row", pa.int64())]
    try:
        table = pa.ipc.open_stream(_content(path, (".arrow",))).read_all()
        table.validate(full=True)
        rows = _dataset(table.cast(pa.schema(columns)))
        found = (digest(rows), rows[:]["row"])
    except (OSError, ValueError, pa.ArrowException) as error:
        _damaged(directory, f"{path.name}: {_reason(error)}", error)
    if found != (recorded["digest"], recorded["row_ids"]):
        _damaged(directory, f"{path.name} does not hold the rows of {MANIFEST}")
    return rows


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not _has_manifest(directory):
        raise DataError(f"{directory}: not a prepared directory (no {MANIFEST})", GIVE_PREPARED)
    try:
        manifest = json.loads(_content(directory / MANIFEST, (".json",)))
        intact = isinstance(manifest, dict) and manifest == _sealed(manifest)
    except (ValueError, RecursionError) as error:
        _damaged(directory, f"{MANIFEST}: {_reason(error)}", error)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise DataError(f"{directory}: its {MANIFEST} is not one of unipelt's", GIVE_PREPARED)
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{directory}: format {manifest['format']}, but this version reads format {FORMAT}",
            "update unipelt, or prepare the data again",
        )
    if not intact:
        _damaged(directory, f"{MANIFEST} was changed")
    return manifest


def _has_manifest(directory: Path) -> bool:
    try:
        return (directory / MANIFEST).is_file()
    except OSError as error:
        hint = "check the path and its rights"
        raise DataError(f"{directory}: {_reason(error)}", hint) from error


def _damaged(directory: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise DataError(f"{directory}: damaged ({what})", "prepare the data again") from cause


def _reopen(directory: Path, settings: DataSettings) -> Prepared:
    """Load a prepared directory; it must be what the settings ask for, where they ask."""
    prepared = load(directory)
    asked: dict[str, str | int | None] = {"task": settings.task, "k": settings.k}
    if "data_seed" in settings.model_fields_set:
        asked["data_seed"] = settings.data_seed
    for key, value in asked.items():
        recorded = prepared.manifest[key]
        if value is not None and value != recorded:
            was = "all rows" if recorded is None else repr(recorded)
            hint = f"leave out --{key.replace('_', '-')}, or prepare the data again"
            raise DataError(f"data.{key} = {value!r}: {directory} was prepared with {was}", hint)
    task = _with_metric(prepared.task, settings.metric)
    metrics = {"metric": task.metric, "also": list(task.also)}
    return Prepared(task, prepared.splits, _sealed(prepared.manifest | metrics))


# Sources


def _packaged(task: Task) -> _Found:
    assert isinstance(task.source, Packaged)
    folder = Path(__file__).parent / task.source.folder
    rows = {
        name: labelled_rows(folder / f"{name}.tsv", task, "label") for name in ("train", "test")
    }
    return _Found(task, {"kind": "packaged", "name": task.source.folder}, rows)


def _glue_directory(task: Task, glue: Glue, root: Path) -> _Found:
    folder = _glue_folder(task.name, glue.folder, root)
    header = isinstance(glue.label, str)
    files = {"train": folder / "train.tsv", "test": folder / f"{glue.dev}.tsv"}
    cells = {split: _read(path, header, published=True) for split, path in files.items()}
    source = {"kind": "directory", "path": str(root)}
    return _found(task, source, cells, [str(column) for column in glue.columns], str(glue.label))


def _glue_folder(name: str, folder: str, root: Path) -> Path:
    """Find a task's folder by GLUE's name in any case, or by the task's."""
    try:
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError) as error:
        hint = "give a directory in GLUE's layout, one that `unipelt prepare` wrote, or 'hub'"
        raise DataError(f"data source {str(root)!r}: {_reason(error)}", hint) from error
    for candidate in (folder, *found):
        if candidate in found and candidate.casefold() in (folder.casefold(), name):
            return root / candidate
    listed = f"folders found: {', '.join(found)}" if found else "it holds no folders"
    raise DataError(f"{root}: no folder {folder!r} for task {name}", listed)


def _glue_hub(task: Task, glue: Glue) -> _Found:
    splits = _from_hub(HUB_GLUE, task.name, f"data.source = 'hub': {HUB_GLUE}:{task.name}")
    cells = {
        split: _hub_cells(f"{HUB_GLUE}:{task.name}, {theirs}", splits[theirs], glue.hub_columns)
        for split, theirs in (("train", "train"), ("test", glue.hub_dev))
    }
    source = {"kind": "hub", "dataset": HUB_GLUE, "config": task.name}
    return _found(task, source, cells, glue.hub_columns, "label")


def _own_files(settings: DataSettings, train_file: str) -> _Found:
    text, label = _own_columns(settings)
    paths = {"train": train_file, "dev": settings.dev_file, "test": settings.test_file}
    named = {split: path for split, path in paths.items() if path}
    cells = {split: _read(Path(path)) for split, path in named.items()}
    name = settings.task or Path(train_file).stem
    task = _own_task(settings, name, text, _label_texts(cells["train"], label))
    source = {"kind": "files", **named, "text": list(text), "label": label}
    return _found(task, source, cells, text, label, own=True)


def _own_hub(settings: DataSettings, dataset: str) -> _Found:
    """Take a hub data set's train split, and as test the first other one that is labelled."""
    text, label = _own_columns(settings)
    name, _, config = dataset.partition(":")
    splits = _from_hub(name, config or None, f"data.dataset = {dataset!r}")
    if "train" not in splits:
        hint = f"splits found: {', '.join(splits)}"
        raise DataError(f"data.dataset = {dataset!r}: no train split", hint)
    cells = {"train": _hub_cells(f"{dataset}, train", splits["train"], text, label)}
    for split in ("test", "validation"):
        if "test" not in cells and split in splits and label in splits[split].column_names:
            labelled = _hub_cells(f"{dataset}, {split}", splits[split], text, label)
            cells |= {"test": labelled} if labelled.rows else {}
    name = settings.task or name.rpartition("/")[2]
    task = _own_task(settings, name, text, _label_texts(cells["train"], label))
    source = {"kind": "hub", "dataset": dataset, "text": list(text), "label": label}
    return _found(task, source, cells, text, label, own=True)


def _found(
    task: Task,
    source: dict[str, Any],
    cells: Mapping[str, "_Cells"],
    text: Sequence[str],
    label: str,
    own: bool = False,
) -> _Found:
    rows = {split: _labelled(found, task, text, label) for split, found in cells.items()}
    notes = tuple(note for found in cells.values() for note in found.notes)
    return _Found(task, source, rows, notes, own)


def _from_hub(name: str, config: str | None, setting: str) -> dict[str, Dataset]:
    """Load a data set of the hub, from its cache if it is there; any failure is a DataError."""
    datasets.logging.set_verbosity_error()
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # The libraries raise dozens of kinds here.
        raise DataError(
            f"{setting}: cannot be read ({type(error).__name__}: {_reason(error)})",
            "give files on disk with --source DIR or --train-file; "
            "`unipelt train --task demo` works offline",
        ) from error


def _hub_cells(origin: str, rows: Dataset, text: Sequence[str], label: str = "label") -> "_Cells":
    """Take the columns of a hub split; rows without a label are left out and counted."""
    _require(origin, (*text, label), rows.column_names)
    table = rows.select_columns([*text, label]).with_format("arrow")[:]
    values = _Cells(origin, {label: table[label]}, range(len(rows))).column(label)
    feature = rows.features[label]
    if isinstance(feature, datasets.ClassLabel):
        named = dict(enumerate(feature.names))
        values = [named.get(value) for value in values]
    elif all(value in (None, -1) for value in values):
        values = [None] * len(values)
    kept = [index for index, value in enumerate(values) if value is not None]
    skipped = len(values) - len(kept)
    notes = (f"{origin}: rows without a label left out: {skipped}",) if skipped else ()
    taken = table.take(pa.array(kept, pa.int64()))
    columns = {name: taken[name] for name in text} | {label: [values[index] for index in kept]}
    return _Cells(origin, columns, kept, published=True, notes=notes)


def _own_columns(settings: DataSettings) -> tuple[tuple[str, ...], str]:
    """Return the text columns and the label column that the user named."""
    text, label = (settings.text or "", *filter(None, [settings.text_pair])), settings.label or ""
    if len({*text, label}) <= len(text):
        listed = ", ".join(map(_short, (*text, label)))
        hint = "give --text, --text-pair and --label different columns"
        raise DataError(f"a column is named twice: {listed}", hint)
    for column in text:
        if column in ("label", "row"):
            hint = "rename the column in the file"
            raise DataError(f"text column {column!r}: unipelt needs this name itself", hint)
    return text, label


def _own_task(
    settings: DataSettings, name: str, text: tuple[str, ...], values: Iterable[str]
) -> Task:
    """Build the task of the user's own rows; its labels are those of the train rows."""
    found = set(values)
    regression = settings.kind == "regression"
    regression |= settings.kind == "auto" and _fractional(found)
    labels = () if regression else _ordered(found)
    metric = own_metric(labels)
    possible = REGRESSION_METRICS if regression else CLASSIFICATION_METRICS
    also = tuple(other for other in possible if other != metric)
    return Task(name, text, labels, metric, also)


def _fractional(labels: Iterable[str]) -> bool:
    """Say whether any label is a fraction: a word beside it is an error, not a class."""
    numbers = [number for label in labels if (number := _number(label)) is not None]
    return any(math.isfinite(number) and not number.is_integer() for number in numbers)


def _ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by value if all are integers, else as strings."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Cells and their checks


@dataclass(frozen=True)
class _Cells:
    """The unchecked cells of one file or hub split, and how an error names their rows.

    `published`: rows that the user cannot mend are taken as they are, empty texts too.
    """

    origin: str
    columns: Mapping[str, Sequence[Any] | pa.ChunkedArray]
    rows: Sequence[int]
    lines: Sequence[int] = ()
    published: bool = False
    notes: tuple[str, ...] = ()

    def refuse(self, index: int, what: str, hint: str = FILL_IN) -> NoReturn:
        """Raise for a row: its line (from 1), or its place (from 0) where there are no lines."""
        place = f"line {self.lines[index]}" if self.lines else f"row {self.rows[index]}"
        raise DataError(f"{self.origin}, {place}: {what}", hint)

    def column(self, name: str) -> Sequence[Any]:
        """Return a column's cells; raise DataError if it is missing or of no usable type."""
        _require(self.origin, [name], self.columns)
        values = self.columns[name]
        if not isinstance(values, pa.ChunkedArray):
            return values
        try:
            cells: list[Any] = values.to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            what = f"column {_short(name)} cannot be read ({_reason(error)})"
            hint = "give texts as UTF-8 strings, labels as strings or numbers"
            raise DataError(f"{self.origin}: {what}", hint) from error
        if values.type in (pa.float16(), pa.float32()):
            # The shortest decimal: 3.8 stays 3.8 whatever file it comes from.
            return [None if cell is None else float(str(np.float32(cell))) for cell in cells]
        return cells


def _require(origin: str, names: Iterable[str], found: Iterable[str]) -> None:
    columns = list(found)
    for name in names:
        if name not in columns:
            listed = ", ".join(map(_short, columns[:50]))
            raise DataError(f"{origin}: no column {_short(name)}", f"columns found: {listed}")


def _labelled(cells: _Cells, task: Task, text: Sequence[str], label: str) -> Dataset:
    """Build the checked rows of a task from the columns that hold its texts and label."""
    _require(cells.origin, (*text, label), cells.columns)
    return _encode(cells, task.text, text, _codes(cells, label, task))


def _encode(
    cells: _Cells, names: Sequence[str], columns: Sequence[str], labels: pa.Array | None = None
) -> Dataset:
    """Build checked rows; `names` are our names of the text columns, `columns` the source's."""
    pairs = zip(names, columns, strict=True)
    arrays = {name: pa.array(_texts(cells, column), pa.string()) for name, column in pairs}
    if labels is not None:
        arrays["label"] = labels
    arrays["row"] = pa.array(cells.rows, pa.int64())
    return _dataset(pa.table(arrays))


def _texts(cells: _Cells, column: str) -> list[str]:
    """Return a column as strings: numbers are written out, nothing else is."""
    texts = []
    for index, value in enumerate(cells.column(column)):
        if value is None or value != value:
            cells.refuse(index, f"{_short(column)} is missing")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            what = f"{_short(column)} is not text but {type(value).__name__}"
            cells.refuse(index, what, "give a string")
        text = str(value)
        if not text.strip() and not cells.published:
            cells.refuse(index, f"{_short(column)} is empty")
        texts.append(text)
    return texts


def _codes(cells: _Cells, column: str, task: Task) -> pa.Array:
    """Return label indices (int64), or values (float64) in regression."""
    texts = _label_texts(cells, column)
    if task.is_regression:
        return pa.array([_value(cells, i, text) for i, text in enumerate(texts)], pa.float64())
    values = task.source.values if isinstance(task.source, Glue) else ()
    known = {name: index for names in (values, task.labels) for index, name in enumerate(names)}
    for index, text in enumerate(texts):
        if text not in known:
            listed = ", ".join(map(_short, task.labels[:20]))
            hint = f"the labels of {task.name} are {listed}"
            cells.refuse(index, f"unknown label {_short(text)}", hint)
    return pa.array([known[text] for text in texts], pa.int64())


def _value(cells: _Cells, index: int, text: str) -> float:
    value = _number(text)
    if value is None:
        hint = "mend the row, or use --set data.kind=classification if labels are names"
        cells.refuse(index, f"the label {_short(text)} is not a number", hint)
    if not abs(value) <= LARGEST_VALUE:
        cells.refuse(index, f"the label {_short(text)} is not finite", "give a number below 1e15")
    return value


def _label_texts(cells: _Cells, column: str) -> list[str]:
    """Return labels as strings, so that 1, 1.0 and "1" are one label in every file type."""
    texts = []
    for index, value in enumerate(cells.column(column)):
        if value is not None and not isinstance(value, str | int | float):
            what = f"the label is not a name or number but {type(value).__name__}"
            cells.refuse(index, what, "give a string or a number")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = "" if value is None else str(value).strip()
        if text.casefold() in ("", "nan"):
            cells.refuse(index, "the label is missing")
        texts.append(text)
    return texts


# Files


def _read(path: Path, header: bool = True, published: bool = False) -> _Cells:
    """Read a file by its suffix; TSV is read with quoting off."""
    content = _content(path, SUFFIXES)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, content)
    text = _decoded(path, content).rstrip("\r\n")
    if not text.strip():
        raise DataError(f"{path}: empty file", GIVE_ROWS)
    if suffix == ".jsonl":
        return _jsonl(path, text)
    records = _csv_records(path, text) if suffix == ".csv" else _tsv_records(text)
    return _grid(path, list(records), header, published)


def _content(path: Path, suffixes: Sequence[str]) -> bytes:
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in suffixes:
                return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {_reason(error)}", "check the path and its rights") from error
    raise DataError(f"{path}: unknown file type {path.suffix!r}", f"give {', '.join(suffixes)}")


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})"
        raise DataError(f"{path}, line {line}: {what}", "save the file as UTF-8") from error


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r").split("\t")


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line on which it starts; quoted fields may hold line ends."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for record in reader:
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        hint = "close the quotes; a quote inside a quoted field is written twice"
        raise DataError(f"{path}, line {line}: malformed CSV ({error})", hint) from error


def _grid(path: Path, rows: list[tuple[int, list[str]]], header: bool, published: bool) -> _Cells:
    """Turn records into columns; of published files, up to 1 % of garbled rows are left out."""
    names = rows.pop(0)[1] if header else [str(index) for index in range(len(rows[0][1]))]
    _check_names(path, names)
    good = [index for index, (_, fields) in enumerate(rows) if len(fields) == len(names)]
    bad = [row for row in rows if len(row[1]) != len(names)]
    if len(bad) > (len(rows) // 100 if published else 0):
        line, fields = bad[0]
        raise DataError(
            f"{path}, line {line}: {len(fields)} fields, where the first line has {len(names)}",
            "mend the line; .csv fields that hold commas need quotes, .tsv is read without quoting",
        )
    if not good:
        raise DataError(f"{path}: a header but no rows", GIVE_ROWS)
    notes = (f"{path}: garbled rows left out: {len(bad)}",) if bad else ()
    columns = dict(zip(names, zip(*(rows[index][1] for index in good), strict=True), strict=True))
    return _Cells(str(path), columns, good, [rows[i][0] for i in good], published, notes)


def _jsonl(path: Path, text: str) -> _Cells:
    rows: list[dict[str, object]] = []
    hint = "write one JSON object on each line"
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # Refuses half a surrogate pair.
        except (ValueError, RecursionError) as error:
            what = f"malformed JSON ({_reason(error)})"
            raise DataError(f"{path}, line {number}: {what}", hint) from error
        if not isinstance(row, dict):
            what = f"not an object but {type(row).__name__}"
            raise DataError(f"{path}, line {number}: {what}", hint)
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return _Cells(str(path), columns, range(len(rows)), range(1, len(rows) + 1))


def _parquet(path: Path, content: bytes) -> _Cells:
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (OSError, ValueError, pa.ArrowException) as error:
        what = f"not a Parquet file ({_reason(error)})" if content else "empty file"
        raise DataError(f"{path}: {what}", "write it again, or give .csv or .jsonl") from error
    _check_names(path, table.column_names)
    if not table.num_rows:
        raise DataError(f"{path}: a header but no rows", GIVE_ROWS)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return _Cells(str(path), columns, range(table.num_rows))


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            what = f"{count} columns are called {_short(name)}"
            raise DataError(f"{path}: {what}", "give each column its own name")


def _short(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _reason(error: BaseException) -> str:
    """Return an error's words in one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0][:200]
