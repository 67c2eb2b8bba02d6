"""From data settings to drawn rows, one task or several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data.cells import FILL_IN, RowError, UnknownLabels, encode_labelled
from unipelt_cli.data.folds import fold_of
from unipelt_cli.data.manifest import make_manifest, seal_manifest
from unipelt_cli.data.own_files import OwnFiles
from unipelt_cli.data.prepared_directory import (
    Prepared,
    has_manifest,
    load_prepared,
    read_manifest,
    task_of,
)
from unipelt_cli.data.readers import noted, read_file
from unipelt_cli.data.sources import find, glue_root, with_metric, with_positive
from unipelt_cli.data.splits import draw_splits
from unipelt_cli.data.unusable import LeftOut
from unipelt_cli.errors import DataError
from unipelt_cli.metrics import REGRESSION_METRICS
from unipelt_cli.tasks import Task, joint_positive

PASS_OVER = "fill it in, or pass over such rows with --skip-unusable"


def prepare(settings: DataSettings, files: OwnFiles | None = None) -> Prepared:
    """Find the rows that `settings` name and draw the splits, or those of one fold.

    `files` may hold own files that were read already.
    Raises DataError for a source that cannot be read, rows that cannot be used or too few rows,
    and ConfigError for an unknown task.
    """
    datasets.disable_progress_bars()
    if settings.fold is not None:
        whole = prepare(settings.model_copy(update={"fold": None}), files)
        return fold_of(whole, settings.fold)
    assert not isinstance(settings.prepared, tuple)
    directory = Path(settings.prepared) if settings.prepared else glue_root(settings)
    if directory and (settings.prepared or has_manifest(directory)):
        return _reopen(directory, settings)
    source = find(settings, files)
    task = with_positive(with_metric(source.task, settings.metric), settings.positive)
    source = replace(source, task=task)
    settled, splits, notes = draw_splits(source, settings)
    return Prepared(source.task, splits, make_manifest(source, settled, splits, notes))


def prepare_each(settings: DataSettings, files: OwnFiles | None = None) -> tuple[Prepared, ...]:
    """Prepare every task that `settings` name, each as if it were alone; see `prepare`.

    Raises DataError as `prepare` does, and for tasks that cannot be trained and scored together.
    """
    every = tuple(prepare(alone, files) for alone in settings.each())
    _check_together([prepared.manifest for prepared in every])
    return every


def read_drawn(settings: DataSettings) -> list[Mapping[str, Any]]:
    """Return the manifests of the prepared directories that `settings` name, without the rows.

    Raises DataError as `prepare_each` does, but for what is wrong with the rows.
    """
    manifests = []
    for alone in settings.each():
        assert isinstance(alone.prepared, str)
        manifest = read_manifest(Path(alone.prepared))
        manifests.append(_asked_for(manifest, task_of(manifest), Path(alone.prepared), alone)[1])
    _check_together(manifests)
    return manifests


def _check_together(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError for tasks that cannot be trained and scored together."""
    names = [manifest["task"] for manifest in manifests]
    for name, manifest in zip(names[1:], manifests[1:], strict=True):
        if names.count(name) > 1:
            hint = "prepare own rows under other names, with --task NAME"
            raise DataError(f"two of the tasks are called {name!r}", hint)
        for key in ("k", "data_seed", "dev_size", "folds"):
            asked, theirs = manifests[0].get(key), manifest.get(key)
            if asked != theirs:
                what = f"{names[0]} was drawn with {asked}, {name} with {theirs}"
                raise DataError(f"data.{key}: {what}", "prepare all tasks with the same settings")
    for name, manifest in zip(names, manifests, strict=True):
        if len(manifests) > 1 and manifest["metric"] == "mse":
            what = f"the metric of {name} is 'mse', which no mean can hold"
            hint = f"choose one of {', '.join(REGRESSION_METRICS[:-1])}"
            raise DataError(f"data.metric: {what}", hint)


def joint_manifest(prepared: Sequence[Prepared]) -> Mapping[str, Any]:
    """Return what is recorded of a run's rows: one task's manifest, or those of several by name."""
    if len(prepared) == 1:
        return prepared[0].manifest
    return {"tasks": {each.task.name: each.manifest for each in prepared}}


def labelled_rows(
    path: Path,
    task: Task,
    label: str,
    kind: str | None = None,
    *,
    encoding: str | None = None,
    text: Sequence[str] = (),
    skip_unusable: bool = False,
    say: Callable[[str], object] = lambda note: None,
) -> Iterator[Dataset]:
    """Read a file of any size as rows of a task, a window at a time.

    Columns are those of a split, labels by the task's names; `text` is what the file calls the
    task's text columns, if not the same. `say` is given what was decided about the file and, at
    the end, what was skipped and which labels the task lacks: of more than two classes they may be
    fewer than half of the rows'. Raises DataError for a file that cannot be read, a missing column,
    other labels that the task lacks, and, unless they are to be skipped, a missing or empty text
    and a missing label.
    """
    left_out, unknown, count = LeftOut(), UnknownLabels(), 0
    names = dict(zip((*task.text, label), (*(text or task.text), label), strict=True))
    windows = noted(read_file(path, list(names.values()), kind, encoding=encoding), say)
    for window in windows:
        cells = window.renamed(names)
        usable = left_out.keep(cells, task.text, label) if skip_unusable else cells
        if not len(usable.rows):
            continue
        try:
            rows = encode_labelled(usable, task, task.text, label, unknown)
        except RowError as error:
            hint = PASS_OVER if error.hint == FILL_IN else error.hint
            raise RowError(error.message, hint, error.index) from None
        count += len(rows)
        yield rows
    for sentence in unknown.notes(count):
        say(f"{path}: {sentence}")
    for sentence in left_out.notes(str(path)) if skip_unusable else ():
        say(sentence)


def _reopen(directory: Path, settings: DataSettings) -> Prepared:
    """Load a prepared directory; it must be what the settings ask for, where they ask."""
    prepared = load_prepared(directory)
    task, manifest = _asked_for(prepared.manifest, prepared.task, directory, settings)
    return Prepared(task, prepared.splits, manifest)


def _asked_for(
    manifest: Mapping[str, Any], task: Task, directory: Path, settings: DataSettings
) -> tuple[Task, Mapping[str, Any]]:
    """Return a prepared task and its manifest with the metric that the settings ask for."""
    asked: dict[str, str | int | None] = {"task": settings.task, "k": settings.k}
    asked["folds"] = None if settings.folds == "auto" else settings.folds
    if "data_seed" in settings.model_fields_set:
        asked["data_seed"] = settings.data_seed
    for key, value in asked.items():
        recorded = manifest.get(key, 0 if key == "folds" else None)
        if value is not None and value != recorded:
            nothing = {"folds": "no folds", "k": "all rows"}.get(key)
            was = (not recorded and nothing) or repr(recorded)
            hint = f"leave out --{key.replace('_', '-')}, or prepare the data again"
            raise DataError(f"data.{key} = {value!r}: {directory} was prepared with {was}", hint)
    task = with_positive(with_metric(task, settings.metric), settings.positive)
    metrics = {"metric": task.metric, "also": list(task.also), **joint_positive([task])}
    return task, seal_manifest({**manifest, **metrics})
