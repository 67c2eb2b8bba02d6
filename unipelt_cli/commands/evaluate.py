"""The command `eval`: score a finished run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import ConfigError
from unipelt_cli.terminal import console, summaries, tables
from unipelt_cli.terminal.command_group import print_json


def evaluate(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    split: Annotated[
        str | None, typer.Option(help="test, dev or train. (default test)", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score other labelled rows instead.")
    ] = None,
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
    if label is not None and file is None:
        raise ConfigError(f"--label {label!r}: the run knows its own", "drop it, or give --file")
    if encoding is not None and file is None:
        raise ConfigError(f"--encoding {encoding!r}: the run knows its own", "drop it, or --file")
    split = split or "test"
    found = run_argument.read_run(run, offline, source, model)
    each = task is None and file is None
    places = list(range(len(found.tasks))) if each else [found.place(task)]
    tuned = found.build(device, model, precision)
    from unipelt_cli.data import preparation
    from unipelt_cli.metrics import compare_with_mean
    from unipelt_cli.models import evaluation
    from unipelt_cli.tasks import joint_positive, joint_scores

    name = split if file is None else str(file)
    total, scored, against_mean = 0, [], {}
    for place in places:
        one = found.tasks[place]
        if file is None:
            parts = iter([found.rows(split, settings.absolute(source), place)])
        else:
            column = label or found.experiment.data.label or "label"
            skip = skip_unusable or bool(found.experiment.data.skip_unusable)
            parts = preparation.labelled_rows(
                file, one, column, encoding=encoding, skip_unusable=skip, say=console.note
            )
        told, true = evaluation.answers(tuned, one, parts, found.experiment.model.max_length, place)
        scored.append(one.score(told, true))
        if (mean := found.train_mean(place)) is not None:
            against_mean[one.name] = compare_with_mean(told, true, mean)
        total += len(true)
    chosen = [found.tasks[place] for place in places]
    answer = {"split": name, "rows": total, "scores": joint_scores(chosen, scored)}
    answer |= joint_positive(chosen) | ({"against_mean": against_mean} if against_mean else {})
    _show(answer)
    if as_json:
        print_json(answer)


def _show(answer: dict[str, Any]) -> None:
    """Print the scores, and what must be known of them."""
    from unipelt_cli.text import shown_score

    scores = answer["scores"]
    names = [shown_score(metric, answer.get("positive")) for metric in scores]
    values = [f"{value:.4f}" for value in scores.values()]
    tables.table(("split", "rows", *names), [[answer["split"], str(answer["rows"]), *values]])
    summaries.warn_of_mean(answer["split"], answer.get("against_mean", {}))
