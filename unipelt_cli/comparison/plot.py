"""A comparison as a picture: scores with intervals, and what a score costs to keep."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.comparison.results import Comparison, GroupSummary, MethodsTable
from unipelt_cli.files.pictures import MARKERS, new_figure
from unipelt_cli.text import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = Mapping[str, Mapping[str, Any]]
HEIGHT, LEFT, RIGHT = 4.2, 6.6, 3.6  # inches, of the panels of a backbone and k
CELL, MOST = 0.13, 40.0  # what a method takes in a task, and a picture at most
LEAST_SPAN = 0.1  # of the scores that a panel shows
LEGEND_LINE, LEGEND_LETTERS, LEGEND_MARK = 0.24, 10, 6  # inches; letters an inch; letters


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw two panels for each backbone and k; raise RunError where nothing can be written."""
    from matplotlib.lines import Line2D

    tables = comparison.tables
    labels = sorted({entry.label for table in tables for entry in table.methods})
    looks = _looks(labels)
    left = max(max(len(t.tasks) * (len(t.methods) + 3) for t in tables) * CELL, LEFT)
    widths = (min(left, MOST), RIGHT)
    longest = max(map(len, labels)) + LEGEND_MARK
    columns = max(1, int(sum(widths) * LEGEND_LETTERS / longest))
    legend = LEGEND_LINE * -(-len(labels) // columns) + 0.2
    with new_figure(path, sum(widths), HEIGHT * len(tables) + legend) as figure:
        panels = figure.subplots(len(tables), 2, squeeze=False, width_ratios=widths)
        for table, (scores, sizes) in zip(tables, panels, strict=True):
            groups = comparison.groups_of(table)
            _scores(scores, table, groups, looks)
            _sizes(sizes, table, groups, looks)
        # Every method once, whichever panels it is in.
        handles = [
            Line2D([], [], linestyle="", label=drawable(label, keep="\n"), **looks[label])
            for label in labels
        ]
        shown = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False
        )
        for text in shown.get_texts():
            text.set_parse_math(False)


def _looks(labels: Sequence[str]) -> Looks:
    """Give each method a colour and a marker: in grey the markers tell them apart."""
    return {
        label: {
            "color": f"C{number % 10}",
            "marker": MARKERS[(number + number // 10) % len(MARKERS)],
        }
        for number, label in enumerate(labels)
    }


def _scores(
    axes: "Axes", table: MethodsTable, groups: Sequence[GroupSummary], looks: Looks
) -> None:
    """Draw each mean with its interval over seeds, methods side by side in each task."""
    tasks, labels = table.tasks, [entry.label for entry in table.methods]
    step = 0.8 / max(1, len(labels))
    for group in groups:
        offset = (labels.index(group.label) - (len(labels) - 1) / 2) * step
        mean, ends = group.mean, group.interval
        reach = None if ends is None else [[mean - ends[0]], [ends[1] - mean]]
        axes.errorbar(
            tasks.index(group.task) + offset,
            mean,
            reach,
            linestyle="",
            markersize=5,
            elinewidth=1,
            capsize=min(3, 60 * step / max(1, len(tasks))),
            **looks[group.label],
        )
    metric = {group.task: group.metric for group in groups}
    axes.set_xticks(
        range(len(tasks)), [drawable(f"{_short(t)}\n{metric[t]}", keep="\n") for t in tasks]
    )
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    for boundary in range(1, len(tasks)):
        axes.axvline(boundary - 0.5, color="0.85", linewidth=0.8)
    _limit(axes, groups)
    _finish(axes, f"{_where(table)}: mean and 95 % interval over seeds", "test score")


def _limit(axes: "Axes", groups: Sequence[GroupSummary]) -> None:
    """Show all means and intervals, save those of two seeds, which are nearly endless."""
    shown = [group.mean for group in groups]
    for group in groups:
        if group.interval is not None and len(group.seeds) > 2:
            shown += group.interval
    _widen(axes, shown)


def _widen(axes: "Axes", values: Sequence[float]) -> None:
    """Show values with some room, and no small difference as large as the picture."""
    middle, span = (max(values) + min(values)) / 2, max(LEAST_SPAN, max(values) - min(values))
    axes.set_ylim(middle - 0.55 * span, middle + 0.55 * span)


def _sizes(axes: "Axes", table: MethodsTable, groups: Sequence[GroupSummary], looks: Looks) -> None:
    """Draw each method's average against what it stores, the head included."""
    from matplotlib.ticker import NullFormatter

    stored = {group.label: group.stored_parameters + group.head_parameters for group in groups}
    averages = {e.label: e.average for e in table.methods if e.average is not None}
    for label, average in averages.items():
        axes.plot(
            max(1, stored[label]), average, markersize=7, alpha=0.8, linestyle="", **looks[label]
        )
    if not averages:
        axes.text(0.5, 0.5, "no method has every task", ha="center", transform=axes.transAxes)
    axes.set_xscale("log")
    sizes = [max(1, stored[label]) for label in averages] or [1]
    # Whole powers of ten: the ticks between them have no room for numbers.
    axes.set_xlim(10 ** floor(log10(min(sizes) * 0.7)), 10 ** ceil(log10(max(sizes) * 1.4)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _widen(axes, list(averages.values()) or [0.5])
    axes.set_xlabel("numbers stored, head included")
    what = "average" if len(table.averaged_tasks) > 1 else "score"
    _finish(axes, f"{what} against size", f"{what} on test")


def _finish(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(drawable(title, keep="\n"), fontsize=10, parse_math=False)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _where(table: MethodsTable) -> str:
    rows = "all rows" if table.k is None else f"k = {table.k}"
    return f"{table.backbone}, {rows}"


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:14]}…"
