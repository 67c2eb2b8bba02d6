"""The commands over several runs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.settings import (
    complete,
    data_flags,
    preset_layers,
    refuse_processes,
    settle,
    with_absolute_paths,
    with_columns,
)
from unipelt_cli.commands.shared.settings import directories as settings_directories
from unipelt_cli.commands.shared.settings import given as settings_given
from unipelt_cli.errors import ConfigError, SweepError, UnipeltError, nearest
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal.command_group import print_json

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment, Settings
    from unipelt_cli.sweeps.grid import Axes, Cell, Grid
    from unipelt_cli.sweeps.sweep import Engine, Sweep


def sweep(
    grid: Annotated[
        str | None,
        typer.Argument(metavar="[GRID]", help="A grid: a TOML file, or one of `list sweeps`."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks; A+B is one run on both.", rich_help_panel="Axes"),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option("--k", metavar="N,M", help="Train rows, or all.", rich_help_panel="Axes"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Methods, or presets.", rich_help_panel="Axes"),
    ] = None,
    data_seeds: Annotated[
        str | None, typer.Option(metavar="N,M", help="Draw the rows.", rich_help_panel="Axes")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N,M", help="Initialise and shuffle.", rich_help_panel="Axes"),
    ] = None,
    backbones: Annotated[
        str | None,
        typer.Option(
            "--backbones", "--model", metavar="A,B", help="Backbones.", rich_help_panel="Axes"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Any setting; a list, [1e-4, 5e-4], is an axis.",
            rich_help_panel="Axes",
        ),
    ] = None,
    preset: options.PresetOption = None,
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
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where all runs go.", rich_help_panel=options.OUTPUT)
    ] = Path("sweep"),
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Try failed cells again.", rich_help_panel=options.OUTPUT),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes at a time. (default one a GPU, else one a core)",
            rich_help_panel="Engine",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: many machines.", rich_help_panel="Engine")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="A Ray cluster's. (default a new one here)",
            rich_help_panel="Engine",
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Ray: CPUs of a process. (default 1)", rich_help_panel="Engine"
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Ray: GPUs of a process; 0.25 is four on one. (default 0)",
            rich_help_panel="Engine",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the cells, with time and disk, and write nothing.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a grid of runs; the same command again goes on, and skips what is finished.

    Example: unipelt sweep --tasks sst2,cola --k 100 --methods lora,unipelt-apl --data-seeds 111,222
    """
    refuse_processes("sweep")
    _check_engine(engine, workers, address, cpus, gpus)
    flags = data_flags(locals() | {"task": None, "k": None, "data_seed": None})
    flags["data"]["prepared"] = settings_directories(prepared)
    flags["train"] = {"device": device, "precision": precision}
    asked = _grid(grid, settings, _axes(tasks, k, methods, data_seeds, seeds, backbones), flags)
    cells = _cells(asked, preset, offline)
    with importing():
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.sweeps.sweep import Sweep

    plan = Sweep(out, cells)
    lanes: _Lanes | _Cluster
    if engine == "ray":
        lanes = _Cluster(address, 1 if cpus is None else cpus, gpus or 0)
    else:
        lanes = _Lanes(cells, workers)
    if dry_run:
        _dry_run(plan, lanes.workers, as_json)
        return
    answer = live_training.sweep(plan, lanes.engine(), lanes.size(cells), retry=retry)
    if as_json:
        print_json(answer)
    if failed := answer["failed"]:
        raise SweepError(
            f"{len(failed)} of {len(cells)} cells failed, the first with: {failed[0]['error']}",
            f"{failed[0]['hint']}; then the same command with --retry",
        )


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Runs, or directories that hold runs.")
    ],
    published: Annotated[
        str | None,
        typer.Option("--against", metavar="paper", help="Set the paper's scores beside these."),
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="A difference in score that does not matter.")
    ] = 0.01,
    write: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also as .md, .tex, .csv or .json; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw .png, .svg or .pdf.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare methods over tasks and seeds: means, intervals, paired tests, costs.

    Example: unipelt compare runs/ --against paper --write table.md
    """
    from unipelt_cli.comparison import documents
    from unipelt_cli.comparison.plot import check
    from unipelt_cli.comparison.plot import plot as plot_plot
    from unipelt_cli.comparison.tables import notes, sheets
    from unipelt_cli.system import network

    for path in write or ():
        documents.check(path)
    if plot is not None:
        check(plot)
    network.settle(offline=True, needed=False)
    with importing():
        from unipelt_cli.comparison import summary
    from unipelt_cli.comparison.published import read as published_read
    from unipelt_cli.terminal import comparison
    from unipelt_cli.terminal.tables import say

    table = None if published is None else published_read(published)
    answer = summary.compare(directories, margin, table)
    for sheet in sheets(answer):
        comparison.show(sheet)
    for note in notes(answer):
        say(("note: ", "yellow"), note)
    for path in write or ():
        documents.write(answer, path)
        say("written: ", (str(path), "bold"))
    if plot is not None:
        plot_plot(answer, plot)
        say("picture: ", (str(plot), "bold"))
    if as_json:
        print_json(answer)


def recommend(
    task: options.TaskOption = None,
    k: options.KOption = None,
    model: options.ModelOption = None,
    data_seed: options.DataSeedOption = None,
    seed: options.SeedOption = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="What to try. (default seven methods)")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Learning rates. (default the method's, a third, thrice)"),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="90s, 10m or 1.5h, for the search and the run.")
    ] = "10m",
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
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where preset, evidence and run go."),
    ] = Path("recommended"),
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Find a method and learning rate for some rows, on dev alone, and train the one chosen.

    Example: unipelt recommend --train-file mine.csv --text text --label label --budget 10m
    """
    refuse_processes("recommend")
    flags = data_flags(locals())
    flags["data"]["prepared"] = settings_directories(prepared)
    flags |= {
        "model": {"backbone": model},
        "train": {"seed": seed, "device": device, "precision": precision},
    }
    with importing():
        from unipelt_cli.commands.shared import live_training
        from unipelt_cli.sweeps import successive_halving
        from unipelt_cli.sweeps.grid import names as grid_names
    from unipelt_cli.config import experiment
    from unipelt_cli.files import atomic
    from unipelt_cli.terminal.tables import say
    from unipelt_cli.training import execution

    seconds = successive_halving.seconds_of(budget)
    own = with_columns([], settings_given(settings, flags))
    settle([complete([], own)], offline)

    def base(name: str, rate: float) -> "Experiment":
        changed: Settings = {"method": {"name": name}, "train": {"learning_rate": rate}}
        return execution.with_drawn_rows(complete([], experiment.merge([own, changed])))

    names = grid_names("--methods", methods)
    found = successive_halving.candidates(base, names, _rates(rates))
    with atomic.new_directory(out) as directory:
        chosen = live_training.search(found, seconds)
        evidence = {
            "chosen": chosen.said(),
            "metric": chosen.metric,
            "candidates": [one.said() for one in successive_halving.ranked(found)],
            "failed": [one.said() for one in found if one.error is not None],
            "budget_seconds": seconds,
        }
        atomic.write_json(directory / "evidence.json", evidence)
        atomic.write(directory / "preset.toml", successive_halving.preset(chosen).encode())
    say("preset: ", (str(out / "preset.toml"), "bold"))
    result = live_training.train(chosen.experiment, out / "run", "new")
    if as_json:
        answer = {"preset": str(out / "preset.toml"), "run": str(out / "run")}
        print_json({**answer, **evidence, "result": result})


def _rates(text: str | None) -> list[float]:
    from unipelt_cli.sweeps.grid import names as grid_names

    words = grid_names("--rates", text)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ConfigError(f"--rates {text!r}: not numbers", "write it like 1e-4,5e-4") from None


def _check_engine(
    engine: str, workers: int | None, address: str | None, cpus: float | None, gpus: float | None
) -> None:
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine {engine!r}: no such engine", nearest(engine, ("local", "ray")))
    others = {"--address": address, "--cpus": cpus, "--gpus": gpus}
    for flag, value in others.items() if engine == "local" else [("--workers", workers)]:
        if value is not None:
            raise ConfigError(
                f"{flag} {value}: not an option of --engine {engine}",
                f"drop it, or give --engine {'ray' if engine == 'local' else 'local'}",
            )


def _axes(
    tasks: str | None,
    k: str | None,
    methods: str | None,
    data_seeds: str | None,
    seeds: str | None,
    backbones: str | None,
) -> "Axes":
    """Read the axes that flags give."""
    with importing():
        from unipelt_cli.sweeps.grid import names as grid_names
        from unipelt_cli.sweeps.grid import numbers

    given: Axes = {
        "tasks": grid_names("--tasks", tasks),
        "k": numbers("--k", k, word="all"),
        "methods": grid_names("--methods", methods),
        "data_seeds": numbers("--data-seeds", data_seeds),
        "seeds": numbers("--seeds", seeds),
        "backbones": grid_names("--backbones", backbones),
    }
    return {name: values for name, values in given.items() if values}


def _grid(name: str | None, settings: list[str] | None, axes: "Axes", flags: "Settings") -> "Grid":
    """Merge a grid's file, flags and `--set`; what the command line says wins."""
    from unipelt_cli.sweeps.grid import Grid, read_grid, take_axes

    read = Grid({}, {}) if name is None else read_grid(name)
    varied, rest = take_axes(settings or [])
    own = settings_given(rest, flags)
    asked = read.axes | axes | varied
    for key in ("k", "data_seeds"):
        if key in asked and own.get("data", {}).get("prepared"):
            raise ConfigError(
                f"the axis {key}: the rows of data.prepared are drawn already",
                "drop the axis, or --prepared",
            )
    if "backbones" in asked:
        asked["backbones"] = [
            with_absolute_paths({"model": {"backbone": own}})["model"]["backbone"]
            for own in asked["backbones"]
        ]
    return Grid(asked, with_absolute_paths(read.settings), own)


def _cells(asked: "Grid", preset: str | None, offline: bool) -> "list[Cell]":
    """Resolve all cells, and settle whether the network is used."""
    from unipelt_cli.config import experiment
    from unipelt_cli.training.execution import with_drawn_rows

    layers = preset_layers([preset] if preset else [])
    shared = [*layers, ("", asked.settings)]
    asked = replace(asked, flags=with_columns(shared, asked.flags))
    cells = asked.cells(lambda own: with_drawn_rows(complete(layers, experiment.merge(own))))
    settle((cell.experiment for cell in cells), offline)
    return cells


class _Lanes:
    """How many processes train at a time, with how many threads, and how many runs in a pass."""

    def __init__(self, cells: "list[Cell]", workers: int | None) -> None:
        from unipelt_cli.models import build

        device = build.choose_device(cells[0].experiment.train.device)
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.cores = cores or 1
        self.gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        if workers is None:
            workers = self.gpus or (1 if device.type != "cpu" else self.cores)
        self.workers = max(1, min(workers, len(cells)))
        self.threads = max(1, self.cores // self.workers)

    def size(self, cells: "list[Cell]") -> int:
        """Return how many runs may share a pass: on a GPU all, else so that no core waits."""
        return len(cells) if self.gpus else max(1, len(cells) // (4 * self.workers))

    def engine(self) -> "Engine":
        from unipelt_cli.sweeps import local_engine

        return lambda groups, is_stopped: local_engine.run(
            groups, self.workers, self.threads, self.gpus, is_stopped
        )


class _Cluster:
    """A Ray cluster, which decides by itself how many processes train at a time."""

    workers = 1

    def __init__(self, address: str | None, cpus: float, gpus: float) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def size(self, cells: "list[Cell]") -> int:
        """Return how many runs may share a pass: on a GPU all."""
        return len(cells) if self.gpus else 1

    def engine(self) -> "Engine":
        from unipelt_cli.sweeps import ray_engine

        return lambda groups, is_stopped: ray_engine.run(
            groups, self.address, self.cpus, self.gpus, is_stopped
        )


def _dry_run(plan: "Sweep", workers: int, as_json: bool) -> None:
    """List the cells, and what those that are left would take."""
    from unipelt_cli.terminal.tables import say, size
    from unipelt_cli.terminal.tables import table as tables_table
    from unipelt_cli.training import estimate

    unfinished = plan.of("waiting", "interrupted", "failed")
    left = {one.cell.name: one.cell.experiment for one in unfinished}
    took: dict[str, estimate.Estimate] = {}
    refused: dict[str, str] = {}
    for name, cost in estimate.estimate(left):
        if isinstance(cost, UnipeltError):
            refused[name] = cost.message
        else:
            took[name] = cost
    rows = []
    for name, one in plan.standings.items():
        known = took.get(name)
        times = "" if known is None else _between(known.least_seconds, known.most_seconds)
        rows.append([name, "cannot begin" if name in refused else one.status, times])
    tables_table(("cell", "status", "time"), rows)
    for name, message in refused.items():
        say(("warning: ", "yellow"), f"{name}: {message}")
    least, most = (
        sum(getattr(own, key) for own in took.values()) / workers
        for key in ("least_seconds", "most_seconds")
    )
    disk = sum(own.disk_bytes for own in took.values())
    say(
        f"{len(left)} of {len(rows)} cells are left: {_between(least, most)} with {workers} at a "
        f"time (as early as patience ends them, or all epochs), {size(disk)} on disk; "
        "nothing was written"
    )
    if as_json:
        cells = [
            {
                "cell": name,
                "status": one.status,
                **({"error": refused[name]} if name in refused else {}),
                **(vars(took[name]) if name in took else {}),
            }
            for name, one in plan.standings.items()
        ]
        total = {"least_seconds": least, "most_seconds": most, "disk_bytes": disk}
        print_json({"sweep": str(plan.directory), "cells": cells, **total})


def _between(least: float, most: float) -> str:
    from unipelt_cli.terminal.tables import duration

    return f"{duration(least)} to {duration(most)}"
