"""A run's gates on a terminal: readable in 80 columns, without colours, and in a pipe."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from unipelt_cli.gates.report import NEARLY_CLOSED
from unipelt_cli.gates.results import (
    AblationReport,
    ClassDifference,
    ClassGates,
    EpochGates,
    ExtremeRows,
    GateLayers,
    GateStatistics,
    LayerGate,
    Loss,
    names_in,
    over_layers,
)
from unipelt_cli.terminal.console import answers, reply
from unipelt_cli.text import plain, shown_score

BLOCKS = " ▏▎▍▌▋▊▉█"
BAR_CELLS = 5
GATE_CELLS = 18  # of a gate's column, with the gap
LAYER_CELLS = 5
FEW_CLASSES = 3  # whose layers are shown one class after another
MOST_DIFFERENCES = 10
MARK = "!"


def show_layers(layers: GateLayers, title: str) -> None:
    """Print layers x gates, two lines each: bar, mean and spread; quantiles and entropy."""
    reply(title)
    room = max(1, (answers().width - LAYER_CELLS) // GATE_CELLS)
    names = names_in(layers)
    for start in range(0, len(names), room):
        chosen = names[start : start + room]
        view = _table("layer", *chosen)
        for layer in layers:
            gates = layer.gates
            cells = [_gate_cell(gates[name]) if name in gates else Text() for name in chosen]
            view.add_row(str(layer.layer), *cells)
        answers().print(view)


def show_legend(nearly_closed: Sequence[LayerGate]) -> None:
    """Print what a cell's second line is, and name the gates that are nearly closed."""
    reply("below: p05, median, p95 and the entropy of its values in bits")
    if nearly_closed:
        named = ", ".join(f"layer {closed.layer} {closed.gate}" for closed in nearly_closed)
        reply((f"{MARK} nearly closed", "yellow"), f" (mean below {NEARLY_CLOSED}): {named}")


def show_classes(classes: Sequence[ClassGates], rows: int, split: str) -> None:
    """Print the classes' gates: by layer where they are few, else means over layers."""
    if len(classes) <= FEW_CLASSES:
        for each in classes:
            show_layers(each.layers, f"{each.name}: {each.rows} {split} rows")
        return
    names = names_in(classes[0].layers)
    view = _table("class", "rows", *names, text=("class",))
    for each in classes:
        means = over_layers(_means(each.layers))
        cells = [_level(means[name]) for name in names]
        view.add_row(_cut(each.name), str(each.rows), *cells)
    reply(f"means over layers, {rows} {split} rows")
    answers().print(view)


def show_differences(differences: Sequence[ClassDifference]) -> None:
    """Print where classes open a gate most differently."""
    if not differences:
        reply("the rows are of one class: nothing to compare")
        return
    reply("where classes open gates most differently, in spreads within classes")
    texts = ("most open", "least open")
    view = _table(
        "layer", "gate", "most open", "mean", "least open", "mean", "in spreads", text=texts
    )
    for difference in differences[:MOST_DIFFERENCES]:
        ends = [
            cell
            for end in (difference.most, difference.least)
            for cell in (_cut(end.name), f"{end.mean:.2f}")
        ]
        effect = "-" if difference.effect is None else f"{difference.effect:.1f}"
        view.add_row(str(difference.layer), difference.gate, *ends, effect)
    answers().print(view)
    if len(differences) > MOST_DIFFERENCES:
        reply(f"{len(differences) - MOST_DIFFERENCES} smaller ones are in --json")


def show_top(top: Sequence[ExtremeRows], texts: Mapping[int, str]) -> None:
    """Print the rows that open each gate most and least, with as much of their text as fits."""
    for extremes in top:
        name = "all gates" if extremes.gate == "all" else extremes.gate
        reply((f"{name}, mean over layers", "bold"))
        view = _table("", "value", "row", "label", "text", text=("label", "text"))
        for end, rows in (("most", extremes.most), ("least", extremes.least)):
            for row in rows:
                cells = _cut(str(row.label)), _cut(texts[row.row][: answers().width])
                view.add_row(end, f"{row.value:.3f}", str(row.row), *cells)
        answers().print(view)


def show_epochs(
    epochs: Sequence[EpochGates],
    metric: str,
    title: str,
    positive: str | Mapping[str, str] | None = None,
) -> None:
    """Print the gates' means over layers after each epoch; the best one is marked."""
    reply(title)
    names = next(names_in(epoch.layers) for epoch in epochs if epoch.layers)
    view = _table("epoch", f"dev {shown_score(metric, positive)}", *names)
    for epoch in epochs:
        means = over_layers(layer.gates for layer in epoch.layers)
        score = epoch.dev.get(metric)
        star = " *" if epoch.is_best else "  "
        view.add_row(
            f"{epoch.epoch}{star}",
            "-" if score is None else f"{score:.4f}",
            *(_level(means[name]) if name in means else "-" for name in names),
            style="bold" if epoch.is_best else "",
        )
    answers().print(view)
    reply("* the best epoch by dev, which is the run's result")


def show_ablation(ablation: AblationReport, title: str, rows: int) -> None:
    """Print layers x submodules: the mean gate, and the score lost where it is closed."""
    row = f"; one row is {1 / rows:.4f}" if ablation.metric == "accuracy" else ""
    reply(title)
    reply(f"mean gate, and what closing it loses; below 0: the score rose{row}")
    names = list(ablation.everywhere)
    view = _table("layer", *names)
    for label, losses in ablation.rows():
        cells = [_loss_cell(losses[name]) if name in losses else Text() for name in names]
        view.add_row(label, *cells)
    answers().print(view)
    reply(ablation.verdict)


def _table(*columns: str, text: Sequence[str] = ()) -> Table:
    """Make a table without lines; columns of `text`, made by `_cut`, give way to the others."""
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        is_number = name in ("layer", "value", "row", "rows", "mean", "epoch", "in spreads")
        view.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=name not in text,
        )
    return view


def _cut(text: str) -> Text:
    """Return text from data as a cell that is cut where its column ends."""
    return Text(plain(text), no_wrap=True, overflow="ellipsis")


def _means(layers: GateLayers) -> list[dict[str, float]]:
    return [{name: gate.mean for name, gate in layer.gates.items()} for layer in layers]


def _gate_cell(gate: GateStatistics) -> Text:
    mark = MARK if gate.mean < NEARLY_CLOSED else " "
    quantiles = " ".join(map(_short, (gate.p05, gate.median, gate.p95)))
    return Text.assemble(
        _bar(gate.mean),
        f"{mark}{gate.mean:.2f} ±{gate.std:.2f}\n",
        (f"{quantiles} {gate.entropy:.1f}", "dim"),
    )


def _loss_cell(loss: Loss) -> Text:
    gate = "   -" if loss.gate is None else f"{loss.gate:.2f}"
    lost = round(loss.lost, 4) + 0.0  # no -0.0000
    return Text.assemble((gate, "dim"), (f" {lost:7.4f}", "bold" if lost > 0 else ""))


def _level(value: float) -> Text:
    return Text.assemble(_bar(value), f" {value:.2f}")


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _bar(share: float) -> tuple[str, str]:
    """Return a bar and its colour."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    bar = ("█" * full + (BLOCKS[rest] if rest else "")).ljust(BAR_CELLS, "·")
    return bar, ("blue", "cyan", "green", "yellow", "red")[min(4, max(0, int(share * 5)))]
