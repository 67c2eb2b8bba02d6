"""The command `eval`: score a finished run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import ConfigError
from unipelt_cli.files.as_json import OPTIONAL
from unipelt_cli.runs.opening import open_run
from unipelt_cli.terminal import console, summaries, tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from datasets import Dataset

    from unipelt_cli.runs.run import Run
    from unipelt_cli.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """A run's scores on a split or a file, and what must be known of them."""

    split: str
    rows: int
    scores: Mapping[str, float]
    positive: str | Mapping[str, str] | None = field(metadata=OPTIONAL)
    against_mean: Mapping[str, Mapping[str, float]] | None = field(metadata=OPTIONAL)


def evaluate(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    split: Annotated[
        str | None, typer.Option(help="test, dev or train. (default test)", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score other labelled rows instead.")
    ] = None,
    text: options.FileTextOption = None,
    text_pair: options.FileTextPairOption = None,
    label: options.LabelOption = None,
    skip_unusable: options.SkipOption = False,
    encoding: options.EncodingOption = None,
    source: options.SourceOption = None,
    device: options.DeviceOption = None,
    precision: options.RunPrecisionOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Score a finished run on one of its splits, or on a file; of several tasks, on each.

    Example: unipelt eval runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    settings.refuse_pairs(
        (settings.flag_text("--split", split), settings.flag_text("--file", file)),
        (settings.flag_text("--source", source), settings.flag_text("--file", file)),
    )
    for_files = {"--text": text, "--text-pair": text_pair, "--label": label, "--encoding": encoding}
    for flag, value in for_files.items():
        if value is not None and file is None:
            raise ConfigError(f"{flag} {value!r}: the run knows its own", "drop it, or give --file")
    split = split or "test"
    opened = open_run(
        run_argument.locate(run, offline),
        offline=offline,
        source=source,
        model=model,
        needs_rows=file is None,
    )
    each = task is None and file is None
    places = list(range(len(opened.tasks))) if each else [opened.task_index(task)]
    tuned, limit = opened.build(device, model, precision), opened.experiment.model.max_length
    from unipelt_cli.metrics import compare_with_mean
    from unipelt_cli.models import evaluation
    from unipelt_cli.tasks import joint_positive, joint_scores

    name = split if file is None else str(file)
    total, scored, against_mean = 0, [], {}
    for task_index in places:
        scored_task = opened.tasks[task_index]
        if file is None:
            parts = iter([opened.rows(split, settings.absolute(source), task_index)])
        else:
            named = list(run_argument.file_columns(scored_task.text, text, text_pair).values())
            parts = _rows_of_file(opened, scored_task, file, named, label, encoding, skip_unusable)
        predicted, true = evaluation.answers(tuned, scored_task, parts, limit, task_index)
        scored.append(scored_task.score(predicted, true))
        if (mean := opened.train_mean(task_index)) is not None:
            against_mean[scored_task.name] = compare_with_mean(predicted, true, mean)
        total += len(true)
    chosen = [opened.tasks[task_index] for task_index in places]
    scores, positive = joint_scores(chosen, scored), joint_positive(chosen).get("positive")
    result = Evaluation(name, total, scores, positive, against_mean or None)
    _show(result)
    if as_json:
        print_json(result)


def _rows_of_file(
    run: "Run",
    task: "Task",
    file: Path,
    text: Sequence[str],
    label: str | None,
    encoding: str | None,
    skip: bool,
) -> "Iterator[Dataset]":
    """Read labelled rows as the run's own were, save for what the command line says of them."""
    from unipelt_cli.data.preparation import labelled_rows

    data = run.experiment.data
    return labelled_rows(
        file,
        task,
        label or data.label or "label",
        encoding=encoding,
        text=text,
        skip_unusable=skip or bool(data.skip_unusable),
        say=console.note,
    )


def _show(scored: Evaluation) -> None:
    """Print the scores, and what must be known of them."""
    from unipelt_cli.text import shown_score

    names = [shown_score(metric, scored.positive) for metric in scored.scores]
    values = [f"{value:.4f}" for value in scored.scores.values()]
    tables.table(("split", "rows", *names), [[scored.split, str(scored.rows), *values]])
    summaries.warn_of_mean(scored.split, scored.against_mean or {})
