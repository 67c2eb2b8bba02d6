"""The command line: parsing, exit codes and two-line errors; everything else is imported late."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands import export, inspect_gates, predict, push, sweep
from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.settings import (
    data_flags,
    refuse_pairs,
    refuse_processes,
    resolve,
    said,
)
from unipelt_cli.commands.shared.settings import directories as settings_directories
from unipelt_cli.commands.shared.settings import trackers as settings_trackers
from unipelt_cli.commands.train import doctor, list_
from unipelt_cli.commands.train import dry_run as train_dry_run
from unipelt_cli.errors import CheckError, ConfigError
from unipelt_cli.system import processes
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import completion, console, tables
from unipelt_cli.terminal.command_group import (
    INTERRUPTED,
    Commands,
    leave,
    obey_requests,
    print_json,
)
from unipelt_cli.version import __version__

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.training.execution import Mode

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
    flags = data_flags(locals())
    experiment = resolve([], settings, flags, offline=offline, data_only=True)
    from unipelt_cli.data import preparation

    if len(experiment.data.each()) > 1:
        raise ConfigError("`prepare` draws one task's rows", "run it for each task, with --task")
    prepared = preparation.prepare(experiment.data)
    chosen = experiment.data
    name = f"{prepared.task.name}-k{chosen.k or 'all'}-d{chosen.data_seed}"
    # A task's name may be a stranger's, and say "../".
    target = out or Path("prepared") / re.sub(r"[^\w.-]+", "-", name)
    preparation.save(prepared, target)
    tables.data_summary(prepared.manifest)
    tables.say("prepared: ", (str(target), "bold"))
    if as_json:
        print_json({"path": str(target), **prepared.manifest})


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
    track: options.TrackOption = None,
    dry_run: options.DryRunOption = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a method on few rows, keep the best epoch by dev, score test once.

    Example: unipelt train --train-file mine.csv --k 100 --dry-run

    Example: unipelt train --task mrpc --k 500 --data-seeds 111,222,333,444,555
    """
    flags = data_flags(locals())
    flags["data"] |= {"tasks": tasks, "prepared": settings_directories(prepared)}
    flags |= {
        "model": {"backbone": model},
        "method": {"name": method},
        "train": {"seed": seed, "device": device, "precision": precision},
    }

    trackers: list[str] = []

    def resolved() -> "Experiment":
        refuse_pairs(
            ("--resume" if resume else None, "--overwrite" if overwrite else None),
            (said("--data-seed", data_seed), said("--data-seeds", data_seeds)),
            (said("--seed", seed), said("--seeds", seeds)),
        )
        if given := said("--data-seeds", data_seeds) or said("--seeds", seeds):
            refuse_processes(given)
        trackers.extend(settings_trackers(track, offline))
        return resolve([preset] if preset else [], settings, flags, offline=offline)

    def described() -> "dict[str, Experiment]":
        experiment = found()
        with importing():
            from unipelt_cli.training import execution
        from unipelt_cli.sweeps.grid import over_seeds

        return over_seeds(execution.with_drawn_rows(experiment), data_seeds, seeds)

    found = processes.tried(resolved)  # before accelerate can import what reads offline switches
    with processes.joined() as joined:
        if not joined.is_main:
            console.hush()
        grid = joined.each(described)
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.sweeps.grid import run_name

        mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
        is_one = data_seeds is None and seeds is None
        root = out or Path("runs")
        directories = [root / run_name(own) for own in grid.values()]
        if is_one and out is not None:
            directories = [out]
        if dry_run:
            first = next(iter(grid.values()))
            joined.each(lambda: train_dry_run(first, directories, mode, as_json))
            return
        if is_one:
            (experiment,) = grid.values()
            answer = live_training.train(experiment, directories[0], mode, joined, trackers)
        else:
            answer = live_training.train_together(grid, directories, mode, trackers)
    if as_json and not console.is_hushed():
        print_json(answer)
    if failed := answer.get("failed"):
        raise CheckError(
            f"{len(failed)} of {len(grid)} runs failed, the first with: {failed[0]['error']}",
            f"see its directory {failed[0]['run']}; the other runs are finished",
        )


app.command()(prepare)
app.command()(train)
app.command("list")(list_)
app.command()(doctor)
app.command("eval")(predict.evaluate)
app.command()(predict.predict)
app.command("inspect-gates")(inspect_gates.inspect_gates)
app.command()(export.export)
app.command()(push.push)
app.command()(predict.verify)
app.command()(predict.reproduce)
app.command()(sweep.sweep)
app.command()(sweep.compare)
app.command()(sweep.recommend)
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
