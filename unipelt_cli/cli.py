"""The command line: parsing, exit codes and two-line errors; everything else is imported late."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli import (
    __version__,
    arguments,
    completion,
    finished,
    inside,
    options,
    processes,
    render,
    several,
    shipping,
)
from unipelt_cli.errors import CheckError, ConfigError, nearest
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
    render.table(columns, [[render.cell(entry[c]) for c in columns] for entry in entries])
    if not entries:
        render.say(f"no {what} in {directory}")


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


app.command("eval")(finished.evaluate)
app.command()(finished.predict)
app.command("inspect-gates")(inside.inspect_gates)
app.command()(shipping.export)
app.command()(finished.verify)
app.command()(finished.reproduce)
app.command()(several.sweep)
app.command()(several.compare)
app.command()(several.recommend)
completion.attach(app)


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
