"""The commands that use and check a finished run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from unipelt_cli import arguments, options, render
from unipelt_cli.errors import CheckError, ConfigError, DataError, UnipeltError
from unipelt_cli.shell import print_json


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
    source: options.SourceOption = None,
    device: options.DeviceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Score a finished run on one of its splits, or on a file; of several tasks, on each.

    Example: unipelt eval runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    arguments.refuse_pairs(
        (arguments.said("--split", split), arguments.said("--file", file)),
        (arguments.said("--source", source), arguments.said("--file", file)),
    )
    if label is not None and file is None:
        raise ConfigError(f"--label {label!r}: the run knows its own", "drop it, or give --file")
    split = split or "test"
    found = arguments.read_run(run, offline, source, model)
    each = task is None and file is None
    places = list(range(len(found.tasks))) if each else [found.place(task)]
    tuned = found.build(device, model)
    from unipelt_cli import data, evaluation
    from unipelt_cli.tasks import joint_scores

    name = split if file is None else str(file)
    total, scored = 0, []
    for place in places:
        one = found.tasks[place]
        if file is None:
            rows = found.rows(split, arguments.absolute(source), place)
        else:
            rows = data.labelled_rows(file, one, label or found.experiment.data.label or "label")
        encoded = evaluation.encode_rows(
            tuned, [rows[c] for c in one.text], found.experiment.model.max_length
        )
        logits = evaluation.compute_logits(tuned, encoded, place)
        scored.append(one.score(evaluation.predictions(one, logits), evaluation.references(rows)))
        total += len(rows)
    scores = joint_scores([found.tasks[place] for place in places], scored)
    render.table(
        ("split", "rows", *scores),
        [[name, str(total), *(f"{value:.4f}" for value in scores.values())]],
    )
    if as_json:
        print_json({"split": name, "rows": total, "scores": scores})


def predict(
    run: options.RunPath,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="Rows to label; - reads stdin.")],
    task: options.OneTaskOption = None,
    device: options.DeviceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The output is always JSON, an object a line.")
    ] = False,
) -> None:
    """Label new rows: one JSON object a line, in the order of the input.

    A file holds the run's text columns. On stdin: JSON lines, or plain lines of text.

    Example: echo "my parcel never came" | unipelt predict RUN -
    """
    found = arguments.read_run(run, offline, model=model)
    place = found.place(task)
    tuned = found.build(device, model)
    from unipelt_cli import cells, data, evaluation

    one = found.tasks[place]
    if file == "-":
        if sys.stdin is None:
            raise DataError("stdin is closed", "give rows on it, or name a FILE")
        columns = data.parse_lines(cells.read_input(sys.stdin.buffer), one.text)
    else:
        rows = data.read_rows(Path(file), one.text)
        columns = [list(rows[column]) for column in one.text]
    encoded = evaluation.encode_rows(tuned, columns, found.experiment.model.max_length)
    logits = evaluation.compute_logits(tuned, encoded, place)
    predicted = evaluation.predictions(one, logits)
    if one.is_regression:
        for value in predicted:
            typer.echo(json.dumps({"value": float(value)}))
        return
    for index, shares in zip(predicted, evaluation.probabilities(logits), strict=True):
        named = {name: float(share) for name, share in zip(one.labels, shares, strict=True)}
        typer.echo(json.dumps({"label": one.labels[int(index)], "probabilities": named}))


def verify(
    run: options.RunPath,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Check a run: its files' hashes, its backbone, its tensors and logits, its rows.

    Example: unipelt verify runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    from unipelt_cli import network

    directory = arguments.locate(run, offline)
    try:
        arguments.settle_run(directory, offline, source, model)
    except UnipeltError:  # the checks will say what is wrong
        network.settle(offline=True, needed=False)
    from unipelt_cli import provenance

    checks = list(provenance.verify(directory, arguments.absolute(source), model))
    render.check_table([(check.what, check.passed, check.said) for check in checks])
    failed = [check for check in checks if check.passed is False]
    if as_json:
        print_json(
            {
                "run": str(run),
                "ok": not failed,
                "checks": [
                    {"what": check.what, "passed": check.passed, "said": check.said}
                    for check in checks
                ],
            }
        )
    if failed:
        raise CheckError(
            f"{run}: {len(failed)} of {len(checks)} checks failed, the first: {failed[0].said}",
            "do not use this run: restore it, or train it again",
        )


def reproduce(
    run: options.RunPath,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. (default RUN-reproduced)")
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a run again from its own settings, and say what differs.

    Example: unipelt reproduce runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    arguments.refuse_processes("reproduce")
    found = arguments.read_run(run, offline, source, model)
    from unipelt_cli import execution, provenance, runs, watching

    target = out or arguments.beside(run, "reproduced")
    mode: execution.Mode = "new" if (target / runs.RESULT).is_file() else "resume"
    with provenance.as_trained(found):
        watching.train(found.experiment.moved(arguments.absolute(source), model), target, mode)
    again = runs.read(target)
    differences, is_equal = provenance.differences(found, again), provenance.is_equal(found, again)
    if differences:
        shown = [[d["what"], render.cell(d["there"]), render.cell(d["here"])] for d in differences]
        render.table(("", str(run), str(target)), shown)
    if is_equal:
        render.say("reproduced: the same scores and, to the byte, the same tensors")
    if as_json:
        print_json(
            {
                "run": str(run),
                "reproduction": str(target),
                "equal": is_equal,
                "differences": differences,
            }
        )
    if not is_equal:
        raise CheckError(
            f"{run}: not reproduced in {target}",
            "see what differs above; equal bytes need fp32, the same machine and versions",
        )
