"""Cells of a grid, and what a worker is told of one."""

from typing import Any

from unipelt_cli.config.experiment import Experiment, merge_settings, resolve
from unipelt_cli.sweeps import grid


def cells_of(axes: dict[str, Any], settings: dict[str, Any] | None = None) -> list[grid.Cell]:
    layers = [{"data": {"task": "sst2", "source": "glue"}}, settings or {}]

    def complete(own: Any) -> Experiment:
        return resolve([("", merge_settings([*layers, *own]))])

    return grid.Grid(axes, {}).cells(complete)


def specification(cell: grid.Cell) -> tuple[Any, ...]:
    one = cell.experiment
    return one.data.task, one.data.k, one.method_name, one.data.data_seed, one.train.seed
