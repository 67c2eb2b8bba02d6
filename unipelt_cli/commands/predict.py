"""The commands that use and check a finished run."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unipelt_cli.commands.shared import options, settings
from unipelt_cli.errors import CheckError, ConfigError, DataError, UnipeltError
from unipelt_cli.terminal import tables
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.runs.loaded_runs import Prediction


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
    precision: options.RunPrecisionOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Score a finished run on one of its splits, or on a file; of several tasks, on each.

    Example: unipelt eval runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    settings.refuse_pairs(
        (settings.said("--split", split), settings.said("--file", file)),
        (settings.said("--source", source), settings.said("--file", file)),
    )
    if label is not None and file is None:
        raise ConfigError(f"--label {label!r}: the run knows its own", "drop it, or give --file")
    split = split or "test"
    found = settings.read_run(run, offline, source, model)
    each = task is None and file is None
    places = list(range(len(found.tasks))) if each else [found.place(task)]
    tuned = found.build(device, model, precision)
    from unipelt_cli.data import preparation
    from unipelt_cli.models import evaluation
    from unipelt_cli.tasks import joint_scores

    name = split if file is None else str(file)
    total, scored = 0, []
    for place in places:
        one = found.tasks[place]
        if file is None:
            parts = iter([found.rows(split, settings.absolute(source), place)])
        else:
            column = label or found.experiment.data.label or "label"
            parts = preparation.labelled_rows(file, one, column)
        told, true = evaluation.answers(tuned, one, parts, found.experiment.model.max_length, place)
        scored.append(one.score(told, true))
        total += len(true)
    scores = joint_scores([found.tasks[place] for place in places], scored)
    tables.table(
        ("split", "rows", *scores),
        [[name, str(total), *(f"{value:.4f}" for value in scores.values())]],
    )
    if as_json:
        print_json({"split": name, "rows": total, "scores": scores})


def predict(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory; left out where --run names some."),
    ],
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE|-", help="Rows to label; - reads stdin.", show_default=False),
    ] = None,
    several: Annotated[
        list[Path] | None,
        typer.Option("--run", metavar="RUN", help="Ask several runs at once; one option each."),
    ] = None,
    task: options.OneTaskOption = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="lines|jsonl|csv|tsv|parquet",
            help="What FILE or stdin holds. (default: its suffix, or its first line, says)",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there, all or nothing. (default stdout)"),
    ] = None,
    device: options.DeviceOption = None,
    precision: options.RunPrecisionOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The output is always JSON, an object a line.")
    ] = False,
) -> None:
    """Label new rows as they come: one JSON object a line, in the order of the input.

    A file of any size holds the run's text columns. On stdin: JSON lines, CSV or TSV with these
    columns and others, or plain lines of text. What is there is answered before more is waited for.

    Example: echo "my parcel never came" | unipelt predict RUN -

    Example: unipelt predict --run RUN --run OTHER rows.csv
    """
    if not several and file not in (None, "-") and not os.path.lexists(str(file)):
        is_text = " " in str(file)
        raise DataError(
            f"{file}: No such file or directory",
            f"give a text as a line: echo {str(file)!r} | unipelt predict {run} -"
            if is_text
            else "name a file of rows, or - for stdin",
        )
    if several and file is not None:
        raise ConfigError(f"RUN {run} and --run contradict each other", "give every run with --run")
    if file is None and not several:
        raise ConfigError("predict: there is no FILE|-", "name a file of rows, or - for stdin")
    given, rows = (several, run) if several else ([Path(run)], str(file))
    found = [settings.read_run(path, offline, model=model) for path in given]
    from unipelt_cli.data import readers
    from unipelt_cli.runs import loaded_runs

    if rows == "-" and sys.stdin is None:
        raise DataError("stdin is closed", "give rows on it, or name a FILE")
    names = loaded_runs.named(given)
    each = dict(zip(names, found, strict=True))
    loaded = loaded_runs.load(each, task, device, model, precision)
    if rows == "-":
        windows = readers.read_input(sys.stdin.buffer, loaded.columns, kind, loaded.plain)
    else:
        windows = readers.read_file(Path(rows), loaded.columns, kind, loaded.plain)
    shown = rows != "-" and not (out is None and sys.stdout is not None and sys.stdout.isatty())
    with _output(out) as write, tables.counting("rows", shown=shown) as count:
        for columns in readers.texts(windows, loaded.columns):
            answers = list(loaded.predict_columns(columns))
            write("".join(f"{json.dumps(_shape(said, several))}\n" for said in answers))
            count(len(answers))


def _shape(said: "dict[str, Prediction]", several: list[Path] | None) -> dict[str, Any]:
    """Return a row's object: one run's answer, or those of all by name."""
    each = {name: own.as_json() for name, own in said.items()}
    return {"runs": each} if several else next(iter(each.values()))


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Give a function that writes, to stdout at once or to a file that is whole or not there."""
    if path is None:
        yield lambda text: typer.echo(text, nl=False)
        return
    from unipelt_cli.files import atomic

    with atomic.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream.write


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
    from unipelt_cli.system import network

    directory = settings.locate(run, offline)
    try:
        settings.settle_run(directory, offline, source, model)
    except UnipeltError:  # the checks will say what is wrong
        network.settle(offline=True, needed=False)
    from unipelt_cli.runs import verification

    checks = list(verification.verify(directory, settings.absolute(source), model))
    tables.check_table([(check.what, check.passed, check.said) for check in checks])
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
        is_whole = all(check.what.split(",")[0].endswith(" rows") for check in failed)
        raise CheckError(
            f"{run}: {len(failed)} of {len(checks)} checks failed, the first: {failed[0].said}",
            "the run is whole, but its rows have changed since: restore them to check it on them"
            if is_whole
            else "do not use this run: restore it, or train it again",
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
    settings.refuse_processes("reproduce")
    found = settings.read_run(run, offline, source, model)
    from unipelt_cli.commands.shared import live_training
    from unipelt_cli.runs import verification
    from unipelt_cli.runs.run import RESULT, read
    from unipelt_cli.training import execution

    target = out or settings.beside(run, "reproduced")
    mode: execution.Mode = "new" if (target / RESULT).is_file() else "resume"
    with verification.as_trained(found):
        live_training.train(found.experiment.moved(settings.absolute(source), model), target, mode)
    again = read(target)
    differences, is_equal = (
        verification.differences(found, again),
        verification.is_equal(found, again),
    )
    if differences:
        shown = [[d["what"], tables.cell(d["there"]), tables.cell(d["here"])] for d in differences]
        tables.table(("", str(run), str(target)), shown)
    if is_equal:
        tables.say("reproduced: the same scores and, to the byte, the same tensors")
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
