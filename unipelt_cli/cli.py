"""The command line: parsing, exit codes and two-line errors; everything else is imported late."""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unipelt_cli import __version__, arguments, options, processes, render, several
from unipelt_cli.errors import CheckError, ConfigError, DataError, UnipeltError, nearest
from unipelt_cli.libraries import importing
from unipelt_cli.shell import INTERRUPTED, Commands, leave, obey_requests, print_json

if TYPE_CHECKING:
    from unipelt_cli.config import Experiment
    from unipelt_cli.execution import Mode

app = typer.Typer(
    name="unipelt",
    cls=Commands,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a pretrained encoder on a few labelled examples with gated submodules, "
    "and see which ones each layer used.",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Hold the options before a command."""
    if version:
        typer.echo(f"unipelt {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def prepare(
    task: options.TaskOption = None,
    k: options.KOption = None,
    data_seed: options.DataSeedOption = None,
    source: options.SourceOption = None,
    dev_size: options.DevSizeOption = None,
    dataset: options.DatasetOption = None,
    train_file: options.TrainFileOption = None,
    dev_file: options.DevFileOption = None,
    test_file: options.TestFileOption = None,
    text: options.TextOption = None,
    text_pair: options.TextPairOption = None,
    label: options.LabelOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="data.KEY=VALUE", help="Any other data setting."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to. (default prepared/TASK-kK-dSEED)"),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Draw train, dev and test rows by the protocol and store them with a manifest.

    Example: unipelt prepare --task mrpc --k 500 --source glue/
    """
    flags = arguments.data_flags(locals())
    experiment = arguments.resolve([], settings, flags, offline=offline, data_only=True)
    from unipelt_cli import data

    if len(experiment.data.each()) > 1:
        raise ConfigError("`prepare` draws one task's rows", "run it for each task, with --task")
    prepared = data.prepare(experiment.data)
    chosen = experiment.data
    name = f"{prepared.task.name}-k{chosen.k or 'all'}-d{chosen.data_seed}"
    # A task's name may be a stranger's, and say "../".
    target = out or Path("prepared") / re.sub(r"[^\w.-]+", "-", name)
    data.save(prepared, target)
    render.data_summary(prepared.manifest)
    render.say("prepared: ", (str(target), "bold"))
    if as_json:
        print_json({"path": str(target), **prepared.manifest})


@app.command()
def train(
    task: options.TaskOption = None,
    tasks: options.TasksOption = None,
    k: options.KOption = None,
    method: options.MethodOption = None,
    model: options.ModelOption = None,
    data_seed: options.DataSeedOption = None,
    data_seeds: options.DataSeedsOption = None,
    seed: options.SeedOption = None,
    seeds: options.SeedsOption = None,
    preset: options.PresetOption = None,
    settings: options.SettingsOption = None,
    source: options.SourceOption = None,
    prepared: options.PreparedOption = None,
    dev_size: options.DevSizeOption = None,
    dataset: options.DatasetOption = None,
    train_file: options.TrainFileOption = None,
    dev_file: options.DevFileOption = None,
    test_file: options.TestFileOption = None,
    text: options.TextOption = None,
    text_pair: options.TextPairOption = None,
    label: options.LabelOption = None,
    device: options.DeviceOption = None,
    precision: options.PrecisionOption = None,
    out: options.RunOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a method on few rows, keep the best epoch by dev, score test once.

    Example: unipelt train --task mrpc --k 500 --data-seeds 111,222,333,444,555
    """
    flags = arguments.data_flags(locals())
    flags["data"] |= {"tasks": tasks, "prepared": arguments.directories(prepared)}
    flags |= {
        "model": {"backbone": model},
        "method": {"name": method},
        "train": {"seed": seed, "device": device, "precision": precision},
    }

    def resolved() -> "Experiment":
        arguments.refuse_pairs(
            ("--resume" if resume else None, "--overwrite" if overwrite else None),
            (arguments.said("--data-seed", data_seed), arguments.said("--data-seeds", data_seeds)),
            (arguments.said("--seed", seed), arguments.said("--seeds", seeds)),
        )
        if given := arguments.said("--data-seeds", data_seeds) or arguments.said("--seeds", seeds):
            arguments.refuse_processes(given)
        return arguments.resolve([preset] if preset else [], settings, flags, offline=offline)

    def described() -> "dict[str, Experiment]":
        experiment = found()
        with importing():
            from unipelt_cli import execution
        from unipelt_cli.grid import over_seeds

        return over_seeds(execution.with_drawn_rows(experiment), data_seeds, seeds)

    found = processes.tried(resolved)  # before accelerate can import what reads offline switches
    with processes.joined() as joined:
        if not joined.is_main:
            render.hush()
        grid = joined.each(described)
        if dry_run:
            joined.each(lambda: _dry_run(next(iter(grid.values())), as_json, len(grid)))
            return
        from unipelt_cli import watching
        from unipelt_cli.grid import run_name

        mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
        if data_seeds is None and seeds is None:
            (experiment,) = grid.values()
            directory = out or Path("runs") / run_name(experiment)
            answer = watching.train(experiment, directory, mode, joined)
        else:
            root = out or Path("runs")
            directories = [root / run_name(own) for own in grid.values()]
            answer = watching.train_together(grid, directories, mode)
    if as_json and not render.is_hushed():
        print_json(answer)
    if failed := answer.get("failed"):
        raise CheckError(
            f"{len(failed)} of {len(grid)} runs failed, the first with: {failed[0]['error']}",
            f"see its directory {failed[0]['run']}; the other runs are finished",
        )


@app.command("eval")
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


@app.command()
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


@app.command("inspect-gates")
def inspect_gates(
    run: options.RunPath,
    task: options.OneTaskOption = None,
    by: Annotated[str, typer.Option(help="layer, class or example.")] = "layer",
    split: Annotated[str, typer.Option(help="test, dev or train.")] = "test",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the layers as a picture too.")
    ] = None,
    source: options.SourceOption = None,
    device: options.DeviceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show how far each submodule's gate opens, layer by layer.

    Example: unipelt inspect-gates runs/mrpc-k500-unipelt-apl-minilm-d111-s42 --plot gates.png
    """
    if by not in ("layer", "class", "example"):
        raise ConfigError(f"--by {by!r}: no such view", "choose one of layer, class, example")
    found = arguments.read_run(run, offline, source, model)
    place = found.place(task)
    tuned = found.build(device, model)
    from unipelt_cli import inspection

    rows = found.rows(split, arguments.absolute(source), place)
    report = inspection.inspect(found, tuned, rows, place)
    layers = report.by_layer()
    count = len(report.rows)
    title = f"gates of {run.resolve().name}, {count} {split} rows"
    answer: dict[str, Any] = {"rows": count, "layers": layers}
    if by == "class":
        answer["classes"] = report.by_class()
        for group in answer["classes"]:
            render.gate_table(group["layers"], f"{group['class']}: {group['rows']} {split} rows")
    elif by == "example":
        answer["examples"] = report.by_example()
        if not as_json:
            for example in answer["examples"]:
                typer.echo(json.dumps(example))
    else:
        render.gate_table(layers, f"{title}, mean ± standard deviation")
    if plot is not None:
        render.plot_gates(layers, f"{title}, mean", plot)
        render.say("picture: ", (str(plot), "bold"))
    if as_json:
        print_json(answer)


@app.command()
def export(
    run: options.RunPath,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="adapters or hf.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. (default RUN-FORMAT)")
    ] = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Write a run in another tool's format, and check that it computes the same there.

    Example: unipelt export RUN --to adapters
    """
    if to not in ("adapters", "hf"):
        raise ConfigError(f"--to {to!r}: no such format", nearest(to, ("adapters", "hf")))
    found = arguments.read_run(run, offline, model=model)
    tuned = found.build("cpu", model)
    from unipelt_cli import export as exports

    report = exports.export(found, tuned, to, out or arguments.beside(run, to))
    parity = report["parity"]
    render.say(
        f"{to}: ",
        (report["path"], "bold"),
        f", largest logit difference {parity['max_abs_logit_diff']:.1e} over {parity['rows']} rows",
    )
    for note in report["notes"]:
        render.say(("note: ", "yellow"), note)
    if as_json:
        print_json(report)
    if not exports.holds(parity):
        raise CheckError(
            f"{report['path']}: logits differ by {parity['max_abs_logit_diff']:.2g}",
            "do not use this export; please report it with the run's experiment.toml",
        )


@app.command()
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

    try:
        arguments.settle_run(run, offline, source, model)
    except UnipeltError:  # the checks will say what is wrong
        network.settle(offline=True, needed=False)
    from unipelt_cli import provenance

    checks = list(provenance.verify(run, arguments.absolute(source), model))
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


@app.command()
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
        shown = [[d["what"], _cell(d["there"]), _cell(d["here"])] for d in differences]
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


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="tasks, methods, presets, sweeps, backbones or runs."),
    ],
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are.")] = Path(
        "runs"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR", help="The backbone that methods are counted on. (default BERT-base)"
        ),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """List what there is to choose from, or the runs in a directory.

    Example: unipelt list methods --model minilm
    """
    if model is not None and what != "methods":
        raise ConfigError(f"--model {model!r}: only methods are counted on one", "drop --model")
    if model is not None:
        arguments.settle_backbone(model, offline)
    with importing():
        from unipelt_cli import listing

    if what not in listing.LISTS:
        raise ConfigError(f"list {what!r}: no such list", nearest(what, listing.LISTS))
    entries = listing.entries(what, directory, model)
    if as_json:
        print_json({what: entries})
        return
    if what == "methods":
        render.method_table(entries, model or "BERT-base")
        return
    columns = list(entries[0]) if entries else []
    render.table(columns, [[_cell(entry[c]) for c in columns] for entry in entries])
    if not entries:
        render.say(f"no {what} in {directory}")


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _dry_run(experiment: "Experiment", as_json: bool, runs: int) -> None:
    from unipelt_cli import execution, watching

    experiment, prepared, tuned = execution.plan(experiment)
    counts = tuned.parameter_counts()
    manifests = [own.manifest for own in prepared]
    watching.summarise(manifests)
    render.table(("parameters", "count"), [[n, f"{c:,}"] for n, c in counts.items()])
    render.say(
        f"{experiment.method_name} on {experiment.model.backbone}, {tuned.pooling} pooling, "
        f"{tuned.precision} on {tuned.device.type}; "
        + (f"the first of {runs} runs; " if runs > 1 else "")
        + "nothing was written"
    )
    if as_json and not render.is_hushed():
        described = {
            key: {
                manifest["task"]: {name: split[key] for name, split in manifest["splits"].items()}
                for manifest in manifests
            }
            for key in ("rows", "labels")
        }
        if len(manifests) == 1:
            described = {key: next(iter(each.values())) for key, each in described.items()}
        print_json({**counts, **described, "experiment": experiment.settings()})


app.command()(several.sweep)
app.command()(several.compare)
app.command()(several.recommend)


def main() -> None:
    """Run the command line."""
    obey_requests()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for long before they sleep take the cores that something else could
        # use: beside two busy programs an epoch took 1.8 times as long, alone 0.9 times.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app(prog_name="unipelt")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            leave()
        raise
