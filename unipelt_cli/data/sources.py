"""Where labelled rows come from, and what each source is called in the manifest.

The packaged demo, GLUE's directory layout, GLUE on the hub, files of the user's own and the
user's own hub data set all end as one value, `SourceRows`: the draw needs to know no more of them.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data.cells import RawColumns, encode_labelled, require
from unipelt_cli.data.label_kind import LabelKind, alike, are_too_many, decide, one_spelling
from unipelt_cli.data.own_files import OwnFiles
from unipelt_cli.data.readers import read_cells
from unipelt_cli.data.unusable import refuse_repeated_header, without_unusable
from unipelt_cli.errors import DataError
from unipelt_cli.metrics import CLASSIFICATION_METRICS, REGRESSION_METRICS
from unipelt_cli.tasks import HUB_GLUE, Glue, Packaged, Task, get_task, own_metric
from unipelt_cli.text import reason, short


@dataclass(frozen=True)
class SourceRows:
    """What a source offers before the draw: checked rows, by split; dev or test may lack."""

    task: Task
    source: Mapping[str, Any]
    rows: Mapping[str, Dataset]
    notes: tuple[str, ...] = ()
    is_own: bool = False


def find(settings: DataSettings, files: OwnFiles | None = None) -> SourceRows:
    """Read the rows that `settings` name, wherever they are; own `files` may be read already.

    Raises DataError for a source that cannot be read or rows that cannot be used, and ConfigError
    for an unknown task.
    """
    if settings.train_file:
        return _own_files(settings, settings.train_file, files or OwnFiles())
    if settings.dataset:
        return _own_hub(settings, settings.dataset)
    task = get_task(settings.task or "")
    if not isinstance(task.source, Glue):
        return _packaged(task)
    root = glue_root(settings)
    if root is None:
        return _glue_hub(task, task.source)
    return _glue_directory(task, task.source, root)


def glue_root(settings: DataSettings) -> Path | None:
    """Return the directory to take a task of GLUE from; None if the rows are elsewhere."""
    own_rows = settings.train_file or settings.dataset
    if own_rows or not isinstance(get_task(settings.task or "").source, Glue):
        return None
    source = settings.source or os.environ.get("UNIPELT_DATA") or "hub"
    return None if source == "hub" else Path(source)


def with_metric(task: Task, metric: str | None) -> Task:
    """Let another metric select the epochs; raise DataError for one of the other kind of task."""
    if metric is None:
        return task
    possible = REGRESSION_METRICS if task.is_regression else CLASSIFICATION_METRICS
    if metric not in possible:
        kind = "regression" if task.is_regression else "classification"
        hint = f"choose one of {', '.join(possible)}"
        raise DataError(f"data.metric = {metric!r}: {task.name} is {kind}", hint)
    also = (name for name in (task.metric, *task.also) if name != metric)
    return replace(task, metric=metric, also=tuple(also))


def with_positive(task: Task, positive: str | None) -> Task:
    """Let F1 be that of another label; raise DataError where the task has not two, or not this."""
    if positive is None:
        return task
    if task.positive_label is None:
        what = "is regression" if task.is_regression else f"has {task.outputs} labels"
        hint = "drop it; F1 of more than two labels is the mean over them, as data.metric=macro_f1"
        raise DataError(f"data.positive = {positive!r}: {task.name} {what}", hint)
    if positive not in task.labels:
        hint = f"choose one of {', '.join(map(short, task.labels))}"
        raise DataError(f"data.positive = {short(positive)}: no label of {task.name}", hint)
    return replace(task, positive=positive)


def _source_rows(
    task: Task,
    source: Mapping[str, Any],
    cells: Mapping[str, RawColumns],
    text: Sequence[str],
    label: str,
) -> SourceRows:
    rows = {
        split: encode_labelled(of_split, task, text, label) for split, of_split in cells.items()
    }
    return SourceRows(
        task, source, rows, tuple(note for of_split in cells.values() for note in of_split.notes)
    )


def _packaged(task: Task) -> SourceRows:
    assert isinstance(task.source, Packaged)
    folder = Path(__file__).parent / task.source.folder
    cells = {
        split: read_cells(folder / f"{split}.tsv", quotes=False) for split in ("train", "test")
    }
    source = {"kind": "packaged", "name": task.source.folder}
    return _source_rows(task, source, cells, task.text, "label")


def _glue_directory(task: Task, glue: Glue, root: Path) -> SourceRows:
    header = isinstance(glue.label, str)
    files = glue_files(task, root)
    cells = {split: read_cells(path, header, published=True) for split, path in files.items()}
    source = {"kind": "directory", "path": str(root)}
    return _source_rows(
        task, source, cells, [str(column) for column in glue.columns], str(glue.label)
    )


def glue_files(task: Task, root: Path) -> dict[str, Path]:
    """Return where a task's splits lie in GLUE's layout; raise DataError without its folder."""
    assert isinstance(task.source, Glue)
    folder = _glue_folder(task.name, task.source.folder, root)
    return {"train": folder / "train.tsv", "test": folder / f"{task.source.dev}.tsv"}


def _glue_folder(name: str, folder: str, root: Path) -> Path:
    """Find a task's folder by GLUE's name in any case, or by the task's."""
    try:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError) as error:
        hint = "give a directory in GLUE's layout, one that `unipelt prepare` wrote, or 'hub'"
        raise DataError(f"data source {str(root)!r}: {reason(error)}", hint) from error
    for candidate in (folder, *folders):
        if candidate in folders and candidate.casefold() in (folder.casefold(), name):
            return root / candidate
    listed = f"folders found: {', '.join(folders)}" if folders else "it holds no folders"
    raise DataError(f"{root}: no folder {folder!r} for task {name}", listed)


def _glue_hub(task: Task, glue: Glue) -> SourceRows:
    splits = _from_hub(HUB_GLUE, task.name, f"data.source = 'hub': {HUB_GLUE}:{task.name}")
    cells = {
        split: _hub_cells(f"{HUB_GLUE}:{task.name}, {theirs}", splits[theirs], glue.hub_columns)
        for split, theirs in (("train", "train"), ("test", glue.hub_dev))
    }
    source = {"kind": "hub", "dataset": HUB_GLUE, "config": task.name}
    return _source_rows(task, source, cells, glue.hub_columns, "label")


def _own_files(settings: DataSettings, train_file: str, files: OwnFiles) -> SourceRows:
    text, label = _own_columns(settings)
    paths = {"train": train_file, "dev": settings.dev_file, "test": settings.test_file}
    named = {split: path for split, path in paths.items() if path}
    cells = {split: files.take(Path(path), settings.encoding) for split, path in named.items()}
    source = {"kind": "files", **named, "text": list(text), "label": label}
    source |= {"encoding": settings.encoding} if settings.encoding else {}
    return _user_rows(settings, Path(train_file).stem, source, cells)


def _own_hub(settings: DataSettings, dataset: str) -> SourceRows:
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
    source = {"kind": "hub", "dataset": dataset, "text": list(text), "label": label}
    return _user_rows(settings, name.rpartition("/")[2], source, cells)


def _user_rows(
    settings: DataSettings, name: str, source: Mapping[str, Any], cells: Mapping[str, RawColumns]
) -> SourceRows:
    """Check the user's own cells, decide what their labels are, and encode them."""
    text, label = tuple(source["text"]), str(source["label"])
    for part in cells.values():
        part.require((*text, label))
        refuse_repeated_header(part, text, label)
    if settings.skip_unusable:
        cells = {split: without_unusable(part, text, label) for split, part in cells.items()}
    by_split = {
        split: [one_spelling(value) for value in part.labels(label)]
        for split, part in cells.items()
    }
    labels = by_split["train"]
    decided = decide([value for values in by_split.values() for value in values], settings.kind)
    notes = []
    if decided.doubtful and settings.kind == "auto":
        notes.append(f"label {short(label)}: {decided.words}; otherwise: {decided.way_out}")
    further: tuple[str, ...] = ()
    if not decided.is_regression:
        if settings.kind == "auto":
            _refuse_unrepeated(cells["train"].origin, labels)
        further = _further_labels(by_split)
        notes += alike([*labels, *further])
    task = _own_task(settings, name, text, labels, decided, further)
    rows = _source_rows(task, source, cells, text, label)
    return replace(rows, is_own=True, notes=(*rows.notes, *notes))


def _own_columns(settings: DataSettings) -> tuple[tuple[str, ...], str]:
    """Return the text columns and the label column that the user named."""
    text, label = (settings.text or "", *filter(None, [settings.text_pair])), settings.label or ""
    if len({*text, label}) <= len(text):
        listed = ", ".join(map(short, (*text, label)))
        hint = "give --text, --text-pair and --label different columns"
        raise DataError(f"a column is named twice: {listed}", hint)
    for column in text:
        if column in ("label", "row"):
            hint = "rename the column in the file"
            raise DataError(f"text column {column!r}: unipelt needs this name itself", hint)
    return text, label


def _refuse_unrepeated(origin: str, labels: Sequence[str]) -> None:
    """Raise DataError for names that are nearly as many as rows: no class can be learnt so."""
    if are_too_many(labels):
        what = f"{origin}: {len(set(labels))} different labels in {len(labels)} rows"
        hint = (
            "name another column with --label; --set data.kind=classification takes them as "
            "classes all the same"
        )
        raise DataError(what, hint)


def _further_labels(by_split: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the labels, by row, that only dev and test have: few train rows show not all of many.

    None where they are rather a mistake: beside two classes, or in most rows of a split.
    """
    known, further = set(by_split["train"]), list[str]()
    for labels in by_split.values():
        unknown = [value for value in labels if value not in known]
        if len(known) > 2 and 2 * len(unknown) <= len(labels):
            further += unknown
    return tuple(further)


def _own_task(
    settings: DataSettings,
    name: str,
    text: tuple[str, ...],
    values: Sequence[str],
    decided: LabelKind,
    further: Sequence[str] = (),
) -> Task:
    """Build the task of the user's own rows: its labels are the train rows' and `further` ones."""
    labels = () if decided.is_regression else _ordered({*values, *further})
    metric, counts = own_metric(labels), Counter(values)
    possible = REGRESSION_METRICS if decided.is_regression else CLASSIFICATION_METRICS
    # Over more labels than two f1 is the mean over them already, and tables are narrow.
    also = tuple(other for other in possible if other not in (metric, "macro_f1"))
    # Of all rows there are, so that every draw of them is scored on the same label.
    rarer = min(reversed(labels), key=counts.__getitem__) if len(labels) == 2 else None
    task = Task(settings.task or name, text, labels, metric, also, positive=rarer)
    return replace(task, decimal_comma=decided.decimal_comma)


def _ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by value if all are integers, else as strings."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _from_hub(name: str, config: str | None, setting: str) -> dict[str, Dataset]:
    """Load a data set of the hub, from its cache if it is there; any failure is a DataError."""
    datasets.logging.set_verbosity_error()
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # The libraries raise dozens of kinds here.
        raise DataError(
            f"{setting}: cannot be read ({type(error).__name__}: {reason(error)})",
            "give files on disk with --source DIR or --train-file; "
            "`unipelt train --task demo` works offline",
        ) from error


def _hub_cells(origin: str, rows: Dataset, text: Sequence[str], label: str = "label") -> RawColumns:
    """Take the columns of a hub split; rows without a label are left out and counted."""
    require(origin, (*text, label), rows.column_names)
    table = rows.select_columns([*text, label]).with_format("arrow")[:]
    values = RawColumns(origin, {label: table[label]}, range(len(rows))).column(label)
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
    return RawColumns(origin, columns, kept, published=True, notes=notes)
