"""The command `sweep`: train a grid of runs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.data_flags import DataFlags, takes_data
from unipelt_cli.commands.shared.settings import (
    command_line_settings,
    complete,
    preset_layers,
    refuse_processes,
    with_absolute_paths,
    with_columns,
)
from unipelt_cli.errors import ConfigError, SweepError, UnipeltError, nearest
from unipelt_cli.runs.opening import settle_network
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import tables
from unipelt_cli.terminal.command_group import print_json
from unipelt_cli.terminal.console import reply, say

if TYPE_CHECKING:
    from unipelt_cli.config.sections import Settings
    from unipelt_cli.sweeps.grid import Axes, Cell, Grid
    from unipelt_cli.sweeps.sweep import Sweep


@takes_data("task", "tasks", "k", "data_seed", "data_seeds")
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
    *,
    data: DataFlags,
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
    flags = data.settings() | {"train": {"device": device, "precision": precision}}
    asked = _grid(grid, settings, _axes(tasks, k, methods, data_seeds, seeds, backbones), flags)
    cells = _cells(asked, preset, offline)
    with importing():
        from unipelt_cli.commands.shared import live_sweep
        from unipelt_cli.sweeps.engines import LocalWorkers, RayCluster
        from unipelt_cli.sweeps.sweep import Sweep

    plan = Sweep(out, cells)
    workforce: LocalWorkers | RayCluster
    if engine == "ray":
        workforce = RayCluster(address, 1 if cpus is None else cpus, gpus or 0)
    else:
        workforce = LocalWorkers(cells, workers)
    if dry_run:
        _dry_run(plan, workforce.workers, as_json)
        return
    size = workforce.size(cells)
    outcome = live_sweep.train_cells(plan, workforce.engine(), size, retry=retry)
    if as_json:
        print_json(outcome)
    if failed := outcome.failed:
        raise SweepError(
            f"{len(failed)} of {len(cells)} cells failed, the first with: {failed[0].error}",
            f"{failed[0].hint}; then the same command with --retry",
        )


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
        from unipelt_cli.sweeps.grid import split_names, split_numbers

    axes: Axes = {
        "tasks": split_names("--tasks", tasks),
        "k": split_numbers("--k", k, word="all"),
        "methods": split_names("--methods", methods),
        "data_seeds": split_numbers("--data-seeds", data_seeds),
        "seeds": split_numbers("--seeds", seeds),
        "backbones": split_names("--backbones", backbones),
    }
    return {name: values for name, values in axes.items() if values}


def _grid(name: str | None, settings: list[str] | None, axes: "Axes", flags: "Settings") -> "Grid":
    """Merge a grid's file, flags and `--set`; what the command line says wins."""
    from unipelt_cli.sweeps.grid import Grid, read_grid, take_axes

    read = Grid({}, {}) if name is None else read_grid(name)
    varied, rest = take_axes(settings or [])
    overrides = command_line_settings(rest, flags)
    asked = read.axes | axes | varied
    for key in ("k", "data_seeds"):
        if key in asked and overrides.get("data", {}).get("prepared"):
            raise ConfigError(
                f"the axis {key}: the rows of data.prepared are drawn already",
                "drop the axis, or --prepared",
            )
    if "backbones" in asked:
        asked["backbones"] = [
            with_absolute_paths({"model": {"backbone": backbone}})["model"]["backbone"]
            for backbone in asked["backbones"]
        ]
    return Grid(asked, with_absolute_paths(read.settings), overrides)


def _cells(asked: "Grid", preset: str | None, offline: bool) -> "list[Cell]":
    """Resolve all cells, and settle whether the network is used."""
    from unipelt_cli.config.experiment import merge_settings

    layers = preset_layers([preset] if preset else [])
    shared = [*layers, ("", asked.settings)]
    asked = replace(asked, flags=with_columns(shared, asked.flags).settings)
    cells = asked.cells(lambda varied: complete(layers, merge_settings(varied)))
    settle_network((cell.experiment for cell in cells), offline=offline)
    if all(cell.experiment.data.prepared is None for cell in cells):
        return cells
    from unipelt_cli.training.planning import with_drawn_rows  # reads the switches: settled by now

    return asked.cells(lambda varied: with_drawn_rows(complete(layers, merge_settings(varied))))


def _dry_run(plan: "Sweep", workers: int, as_json: bool) -> None:
    """List the cells, and what those that are left would take."""
    from unipelt_cli.training import estimate

    unfinished = plan.of("waiting", "interrupted", "failed")
    left = {state.cell.name: state.cell.experiment for state in unfinished}
    took: dict[str, estimate.Estimate] = {}
    refused: dict[str, str] = {}
    for name, cost in estimate.estimate(left):
        if isinstance(cost, UnipeltError):
            refused[name] = cost.message
        else:
            took[name] = cost
    rows = []
    for name, state in plan.states.items():
        known = took.get(name)
        times = "" if known is None else _between(known.least_seconds, known.most_seconds)
        rows.append([name, "cannot begin" if name in refused else state.status, times])
    tables.table(("cell", "status", "time"), rows)
    for name, message in refused.items():
        say(("warning: ", "yellow"), f"{name}: {message}")
    least, most = (
        sum(getattr(cost, key) for cost in took.values()) / workers
        for key in ("least_seconds", "most_seconds")
    )
    disk = sum(cost.disk_bytes for cost in took.values())
    reply(
        f"{len(left)} of {len(rows)} cells are left: {_between(least, most)} with {workers} at a "
        f"time (as early as patience ends them, or all epochs), {tables.size(disk)} on disk; "
        "nothing was written"
    )
    if as_json:
        cells = [
            {
                "cell": name,
                "status": state.status,
                **({"error": refused[name]} if name in refused else {}),
                **(vars(took[name]) if name in took else {}),
            }
            for name, state in plan.states.items()
        ]
        total = {"least_seconds": least, "most_seconds": most, "disk_bytes": disk}
        print_json({"sweep": str(plan.directory), "cells": cells, **total})


def _between(least: float, most: float) -> str:
    return f"{tables.duration(least)} to {tables.duration(most)}"
