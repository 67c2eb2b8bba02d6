"""A run's gates as pictures: heatmaps of layers x submodules, and lines over epochs."""

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

from unipelt_cli.files.pictures import MARKERS, new_figure
from unipelt_cli.gates.results import (
    AblationReport,
    ClassGates,
    EpochGates,
    GateLayers,
    gate_names,
    names_in,
    over_layers,
)
from unipelt_cli.text import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN, ROW = 0.95, 0.32  # inches, of a cell
MARGIN_WIDTH, MARGIN_HEIGHT = 1.1, 1.1
ACROSS = 4  # panels in a row
COLOURS = "cividis"  # the same for those who see red and green alike, and in grey
LINES = ("#0072b2", "#b34a00", "#00785a", "#a3487a", "#6b5b00")
LEAST_LOSS = 0.01  # what the darkest cell of an ablation loses at least


def plot_layers(layers: GateLayers, title: str, path: Path) -> None:
    """Draw the gates' means, layers upwards."""
    _plot_panels([("", layers)], title, path)


def plot_classes(classes: Sequence[ClassGates], title: str, path: Path) -> None:
    """Draw the gates' means, a panel for each class."""
    _plot_panels([(f"{each.name}, {each.rows} rows", each.layers) for each in classes], title, path)


def plot_ablation(ablation: AblationReport, title: str, path: Path) -> None:
    """Draw the score lost where a submodule is closed, in one layer or (at the foot) in all."""
    rows, names = ablation.rows(), list(ablation.everywhere)
    values = [[losses[n].lost if n in losses else nan for n in names] for _, losses in rows]
    most = max(LEAST_LOSS, *(value for row in values for value in row if not isnan(value)))
    with new_figure(path, *_size(len(names), len(rows))) as figure:
        axes = figure.subplots()
        _heatmap(axes, values, names, [label for label, _ in rows], 0.0, most, 3)
        figure.suptitle(_title(title), fontsize=9, parse_math=False)
        figure.colorbar(axes.images[0], ax=axes, label=f"{ablation.metric} lost")


def plot_epochs(epochs: Sequence[EpochGates], title: str, path: Path) -> None:
    """Draw each gate's mean over layers after each epoch; the best epoch is a line."""
    shown = [
        (epoch.epoch, over_layers(layer.gates for layer in epoch.layers))
        for epoch in epochs
        if epoch.layers
    ]
    with new_figure(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        for number, name in enumerate(gate_names([means for _, means in shown])):
            at = [(epoch, means[name]) for epoch, means in shown if name in means]
            every = max(1, len(at) // 10)  # in grey, markers tell the lines apart
            marker, colour = MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]
            where = zip(*at, strict=True)
            axes.plot(*where, marker=marker, color=colour, markevery=every, label=name)
        for best in (epoch.epoch for epoch in epochs if epoch.is_best):
            axes.axvline(best, color="0.5", linestyle=":", label="best epoch")
        axes.set_ylim(0, 1)
        axes.set_xlabel("epoch")
        axes.set_ylabel("gate, mean over layers and dev rows")
        axes.legend(frameon=False)
        axes.set_title(_title(title), fontsize=9, parse_math=False)


def _plot_panels(panels: Sequence[tuple[str, GateLayers]], title: str, path: Path) -> None:
    names = names_in(panels[0][1])
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    width, height = _size(len(names), len(panels[0][1]))
    with new_figure(path, width * across + 0.6, height * down + 0.4) as figure:
        grid = figure.subplots(down, across, squeeze=False).flatten()
        for axes, (label, layers) in zip(grid, panels, strict=False):
            means = [
                [layer.gates[n].mean if n in layer.gates else nan for n in names]
                for layer in layers
            ]
            _heatmap(axes, means, names, [str(layer.layer) for layer in layers], 0.0, 1.0, 2)
            axes.set_title(drawable(label), fontsize=9, parse_math=False)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(_title(title), fontsize=9, parse_math=False)
        figure.colorbar(grid[0].images[0], ax=list(grid), label="mean gate")


def _heatmap(
    axes: "Axes",
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    least: float,
    most: float,
    digits: int,
) -> None:
    """Draw values as cells with their numbers in them; nan is an empty one."""
    axes.imshow(values, vmin=least, vmax=most, cmap=COLOURS, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            shade = "white" if value < least + 0.45 * (most - least) else "black"
            shown = "" if isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"
            axes.text(column, row, shown, ha="center", va="center", color=shade, fontsize=8)


def _size(columns: int, rows: int) -> tuple[float, float]:
    return COLUMN * columns + MARGIN_WIDTH, ROW * rows + MARGIN_HEIGHT


def _title(text: str) -> str:
    """Put a run's name on a line of its own: a picture may be narrow."""
    return "\n".join(map(drawable, text.split(", ", 1)))
