"""From a source of labelled rows to three splits, and a manifest that says what they hold.

Sources: GLUE's directory layout, the hub, files of the user's own, the packaged demo, and
directories that `save` wrote. Whatever the source, its cells pass one check (`_encode`) and its
train rows one draw (`_draw`), so that the same settings always give the same bytes.
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
import pyarrow as pa
import pyarrow.parquet as pq
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

# Columns: the task's text columns (str), "label" (int64 index; float64 value in regression) and
# "row" (int64: the place in the source, from 0).
Rows = Dataset


@dataclass(frozen=True)
class Prepared:
    """A resolved task, its "train", "dev" and "test" rows, and what is recorded of them."""

    task: Task
    splits: Mapping[str, Dataset]
    manifest: dict[str, Any]


def prepare(settings: DataSettings) -> Prepared:
    """Find the rows that `settings` name and draw the three splits.

    Raises DataError for a source that cannot be read, rows that cannot be used, or too few rows;
    ConfigError for an unknown task.
    """
    datasets.disable_progress_bars()
    source = settings.source or os.environ.get("UNIPELT_DATA") or "hub"
    if settings.prepared:
        return _reopen(Path(settings.prepared), settings)
    if settings.train_file:
        found = _own_files(settings)
    elif settings.dataset:
        found = _own_hub(settings)
    else:
        task = get_task(settings.task or "")
        if isinstance(task.source, Packaged):
            found = _packaged(task, task.source)
        elif source == "hub":
            found = _glue_hub(task)
        elif (Path(source) / MANIFEST).is_file():
            return _reopen(Path(source), settings)
        else:
            found = _glue_directory(task, Path(source))
    task = _with_metric(found.task, settings.metric)
    splits, notes = _draw(found, settings)
    return Prepared(task, splits, _manifest(task, found, settings, splits, notes))


@dataclass(frozen=True)
class _Cells:
    """The unchecked cells of one file or hub split, and how an error names their rows."""

    origin: str
    columns: Mapping[str, Sequence[object] | pa.ChunkedArray]
    rows: Sequence[int]
    lines: Sequence[int] | None = None
    published: bool = False
    notes: tuple[str, ...] = ()

    def where(self, index: int) -> str:
        """Name a row: its line (from 1), or its place (from 0) where there are no lines."""
        place = f"line {self.lines[index]}" if self.lines else f"row {self.rows[index]}"
        return f"{self.origin}, {place}"

    def column(self, name: str) -> Sequence[object]:
        """Return a column's cells; raise DataError with the columns found if it is missing."""
        if name not in self.columns:
            raise DataError(
                f"{self.origin}: no column {_short(name)}",
                f"columns found: {', '.join(map(_short, self.columns))}",
            )
        values = self.columns[name]
        if not isinstance(values, pa.ChunkedArray):
            return values
        try:
            if pa.types.is_float32(values.type) or pa.types.is_float16(values.type):
                # The shortest decimal, so that 3.8 is 3.8 whatever file it came in.
                return [None if v is None else float(str(np.float32(v))) for v in values.to_pylist()]
            return list(values.to_pylist())
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(
                f"{self.origin}: column {_short(name)} cannot be read ({_first_line(error)})",
                "give text columns of UTF-8 strings and a label column of strings or numbers",
            ) from error


@dataclass(frozen=True)
class _Found:
    """What a source offers before the draw: checked rows; no dev or test where it has none."""

    task: Task
    source: dict[str, Any]
    train: Dataset
    dev: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...] = ()
    own: bool = False


# Sources ------------------------------------------------------------------------------------


def _packaged(task: Task, source: Packaged) -> _Found:
    folder = Path(__file__).parent / source.folder
    train, test = (
        _encode(_read(folder / f"{split}.tsv"), dict(zip(task.text, task.text, strict=True)), "label", task)
        for split in ("train", "test")
    )
    return _Found(task, {"kind": "packaged", "name": source.folder}, train, None, test)


def _glue_directory(task: Task, root: Path) -> _Found:
    assert isinstance(task.source, Glue)
    folder = _glue_folder(task.name, task.source.folder, root)
    columns = dict(zip(task.text, map(str, task.source.columns), strict=True))
    header = isinstance(task.source.label, str)
    cells = [
        _read(folder / f"{split}.tsv", header=header, published=True)
        for split in ("train", task.source.dev)
    ]
    train, test = (_encode(split, columns, str(task.source.label), task) for split in cells)
    notes = tuple(note for split in cells for note in split.notes)
    return _Found(task, {"kind": "directory", "path": str(root)}, train, None, test, notes)


def _glue_folder(name: str, folder: str, root: Path) -> Path:
    """Find a task's folder in a directory by GLUE's name, in any case, or by ours."""
    try:
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.source = {str(root)!r}: {reason}",
            "give a directory in GLUE's layout, one that `unipelt prepare` wrote, or 'hub'",
        ) from error
    for candidate in (folder, *found):
        if candidate in found and candidate.casefold() in (folder.casefold(), name):
            return root / candidate
    listed = f"folders found: {', '.join(found)}" if found else "it holds no folders"
    raise DataError(f"{root}: no folder {folder!r} for task {name}", listed)


def _glue_hub(task: Task) -> _Found:
    assert isinstance(task.source, Glue)
    splits = _from_hub(HUB_GLUE, task.name, f"data.source = 'hub': {HUB_GLUE}")
    columns = dict(zip(task.text, task.source.hub_columns, strict=True))
    train, test = (
        _hub_cells(f"{HUB_GLUE}:{task.name} {split}", splits[split], columns.values(), "label")
        for split in ("train", task.source.hub_dev)
    )
    return _Found(
        task,
        {"kind": "hub", "dataset": HUB_GLUE, "config": task.name},
        _encode(train, columns, "label", task),
        None,
        _encode(test, columns, "label", task),
        (*train.notes, *test.notes),
    )


def _own_files(settings: DataSettings) -> _Found:
    paths = {"train": settings.train_file, "dev": settings.dev_file, "test": settings.test_file}
    cells = {split: _read(Path(path)) for split, path in paths.items() if path}
    name = settings.task or Path(cells["train"].origin).stem
    task = _own_task(settings, cells["train"], name)
    columns = dict(zip(task.text, task.text, strict=True))
    label = str(settings.label)
    rows = {split: _encode(found, columns, label, task) for split, found in cells.items()}
    named = {split: path for split, path in paths.items() if path}
    source = {"kind": "files", **named, "text": list(task.text), "label": label}
    return _Found(
        task, source, rows["train"], rows.get("dev"), rows.get("test"), own=True
    )


def _own_hub(settings: DataSettings) -> _Found:
    name, _, config = str(settings.dataset).partition(":")
    setting = f"data.dataset = {settings.dataset!r}"
    splits = _from_hub(name, config or None, setting)
    if "train" not in splits:
        raise DataError(f"{setting}: no train split", f"splits found: {', '.join(splits)}")
    text, label = [c for c in (settings.text, settings.text_pair) if c], str(settings.label)
    cells = {
        split: _hub_cells(f"{name} {split}", splits[split], text, label)
        for split in ("train", "test", "validation")
        if split in splits and (split == "train" or label in splits[split].column_names)
    }
    task = _own_task(settings, cells["train"], settings.task or name.rpartition("/")[2])
    columns = dict(zip(task.text, task.text, strict=True))
    labelled = [split for split in ("test", "validation") if split in cells and cells[split].rows]
    used = ["train", *labelled[:1]]
    notes = [note for split in used for note in cells[split].notes]
    notes += [f"test: the {split} split of the hub" for split in labelled[:1]]
    rows = [_encode(cells[split], columns, label, task) for split in used]
    source = {"kind": "hub", "dataset": name, "config": config or None, "text": text, "label": label}
    test = rows[1] if labelled else None
    return _Found(task, source, rows[0], None, test, tuple(notes), own=True)


def _from_hub(name: str, config: str | None, setting: str) -> Mapping[str, Dataset]:
    """Load a data set of the hub, from the cache first; any failure is a DataError."""
    datasets.logging.set_verbosity_error()
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # dozens of kinds come out of the libraries here
        raise DataError(
            f"{setting}: cannot be read ({type(error).__name__}: {_first_line(error)})",
            "give --source DIR with GLUE's files, or your own --train-file; "
            "`unipelt train --task demo` works offline",
        ) from error


def _hub_cells(origin: str, rows: Dataset, text: Iterable[str], label: str) -> _Cells:
    """Take the columns of a hub split that are there; rows without a label are left out."""
    present = [name for name in dict.fromkeys((*text, label)) if name in rows.column_names]
    if label not in present or len(present) < len({*text, label}):
        missing = next(name for name in (*text, label) if name not in present)
        _Cells(origin, dict.fromkeys(rows.column_names, ()), ()).column(missing)
    table = rows.select_columns(present).with_format("arrow")[:]
    labels = table[label].to_pylist()
    feature = rows.features[label]
    if isinstance(feature, datasets.ClassLabel):
        labels = [None if not 0 <= (n if n is not None else -1) < len(feature.names) else feature.names[n] for n in labels]
    elif set(labels) <= {None, -1}:
        labels = [None] * len(labels)
    kept = [index for index, value in enumerate(labels) if value is not None]
    notes = (f"{origin}: {len(labels) - len(kept)} rows without a label were skipped",)
    columns = {name: table[name].take(pa.array(kept, pa.int64())) for name in present}
    columns[label] = columns[label] if feature is None else [labels[index] for index in kept]
    return _Cells(origin, columns, kept, None, True, notes if len(kept) < len(labels) else ())
