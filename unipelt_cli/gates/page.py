"""A run's gates as one HTML page that loads nothing and runs nothing: it opens anywhere, for ever.

Which class is shown is the address's fragment (`#class=2`), by style alone. The template escapes
every name; here are the numbers that it shows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from unipelt_cli.errors import ConfigError
from unipelt_cli.files import atomic
from unipelt_cli.files.as_json import as_json
from unipelt_cli.gates.results import (
    AblationReport,
    EpochGates,
    GateLayers,
    GateStatistics,
    Inspection,
    Loss,
    gate_names,
    names_in,
    over_layers,
)
from unipelt_cli.text import plain

TEMPLATE = Path(__file__).with_name("page.html")
FORMATS = (".html", ".htm")
LEAST_LOSS = 0.01  # what the strongest cell of an ablation loses at least
WIDTH, HEIGHT = 720, 260  # of the lines over epochs
LEFT, RIGHT, TOP, BOTTOM = 34, 110, 10, 34  # their margins
LINE = 16  # between two names of lines
STYLES = 5  # of lines, in the template


@dataclass(frozen=True)
class _Cell:
    """A cell as dark as its percent, whose detail shows where it is pointed at or focused."""

    text: str
    percent: int
    detail: str

    @property
    def style(self) -> str:
        """The classes under which its text keeps apart from its ground."""
        return " ".join(f"over{bound}" for bound in (45, 62) if self.percent >= bound)


@dataclass(frozen=True)
class _Table:
    """Layers against gates or submodules; None is an empty cell."""

    kind: str
    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[_Cell | None]]]


@dataclass(frozen=True)
class _Rule:
    """A line of the chart's frame."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class _Curve:
    """A gate's mean over epochs as points, and the height of its name beside them."""

    name: str
    style: int
    points: str
    label_y: int


@dataclass(frozen=True)
class _Chart:
    """Gates over epochs, in the units of the picture."""

    levels: Sequence[tuple[str, _Rule]]
    best: Sequence[_Rule]
    epochs: Sequence[tuple[int, int]]
    curves: Sequence[_Curve]
    width: int = WIDTH
    height: int = HEIGHT
    legend_x: int = WIDTH - RIGHT + 8
    epochs_y: int = HEIGHT - BOTTOM + 18


def check(path: Path) -> None:
    """Raise ConfigError for a file whose ending names no page."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--html {str(path)!r}: no such format", "give a path ending in .html")


def write(inspection: Inspection, title: str, path: Path) -> None:
    """Write an inspection's layers and classes, and the ablation and epochs that it may hold."""
    environment = Environment(
        autoescape=True,
        finalize=_visible,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys in the answer's order
    lost = _lost(inspection.ablation)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        rows=inspection.rows,
        split=inspection.split,
        classes=[(each, _gates(each.layers, lost)) for each in inspection.classes or ()],
        gates=_gates(inspection.layers, lost) if inspection.layers else None,
        ablation=inspection.ablation,
        losses=inspection.ablation and _losses(inspection.ablation),
        chart=_chart(inspection.epochs) if inspection.epochs else None,
        answer=as_json(inspection),
    )
    atomic.write(path, page.encode())


def _visible(value: object) -> object:
    """Make control characters visible, line breaks kept, in all that the template did not make."""
    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    return "\n".join(map(plain, value.split("\n")))


def _gates(layers: GateLayers, lost: Mapping[tuple[int, str], str]) -> _Table:
    names = names_in(layers)
    rows = []
    for layer in layers:
        cells: list[_Cell | None] = []
        for name in names:
            gate = layer.gates.get(name)
            if gate is None:
                cells.append(None)
                continue
            line = lost.get((layer.layer, name), "")
            detail = f"layer {layer.layer} {name}\n{_numbers(gate)}{line}"
            cells.append(_Cell(f"{gate.mean:.2f}", round(100 * gate.mean), detail))
        rows.append((str(layer.layer), cells))
    return _Table("gates", names, rows)


def _numbers(gate: GateStatistics) -> str:
    return (
        f"mean {gate.mean:.3f} ± {gate.std:.3f}\n"
        f"min {gate.min:.2f}  p05 {gate.p05:.2f}  median {gate.median:.2f}  "
        f"p95 {gate.p95:.2f}  max {gate.max:.2f}\n"
        f"entropy {gate.entropy:.2f} bits, undecided {gate.undecided:.2f}"
    )


def _lost(ablation: AblationReport | None) -> dict[tuple[int, str], str]:
    """Return what closing a gate's submodule loses, as a line; LoRA's two gates share theirs."""
    if ablation is None:
        return {}
    return {
        (layer.layer, name): f"\nclosed: {loss.lost:.4f} {ablation.metric} lost"
        for layer in ablation.layers
        for part, loss in layer.gates.items()
        for name in (part, f"{part}_query", f"{part}_value")
    }


def _losses(ablation: AblationReport) -> _Table:
    names, rows = list(ablation.everywhere), ablation.rows()
    most = max(LEAST_LOSS, *(loss.lost for _, losses in rows for loss in losses.values()))
    cells = [
        (
            label,
            [
                _loss(losses[name], f"{_layer(label)} {name}", ablation, most)
                if name in losses
                else None
                for name in names
            ],
        )
        for label, losses in rows
    ]
    return _Table("lost", names, cells)


def _layer(label: str) -> str:
    return "all layers" if label == "all" else f"layer {label}"


def _loss(loss: Loss, name: str, ablation: AblationReport, most: float) -> _Cell:
    flips = "" if loss.flips is None else f"\n{loss.flips} labels change"
    gate = "" if loss.gate is None else f"\nmean gate {loss.gate:.3f}"
    scores = f"{ablation.metric} {ablation.score:.4f}, closed {loss.score:.4f}"
    percent = round(100 * (max(0.0, loss.lost) / most))
    return _Cell(f"{loss.lost + 0.0:.4f}", percent, f"{name}\n{scores}{flips}{gate}")


def _chart(epochs: Sequence[EpochGates]) -> _Chart:
    """Draw each gate's mean over layers after each epoch, named at the line's end."""
    means = {
        epoch.epoch: over_layers(layer.gates for layer in epoch.layers)
        for epoch in epochs
        if epoch.layers
    }
    first, last = min(means), max(means)

    def across(epoch: int) -> float:
        share = (epoch - first) / max(1, last - first)
        return LEFT + (WIDTH - LEFT - RIGHT) * float(share)

    best = [epoch.epoch for epoch in epochs if epoch.is_best]
    points = {
        name: [
            (across(epoch), _down(gates[name])) for epoch, gates in means.items() if name in gates
        ]
        for name in gate_names(means.values())
    }
    return _Chart(
        levels=[
            (f"{value:g}", _rule(LEFT, _down(value), WIDTH - RIGHT, _down(value)))
            for value in (0.0, 0.5, 1.0)
        ],
        best=[_rule(across(epoch), TOP, across(epoch), HEIGHT - BOTTOM) for epoch in best],
        epochs=[(round(across(epoch)), epoch) for epoch in sorted({first, last, *best})],
        curves=list(_curves(points)),
    )


def _down(value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)


def _rule(x1: float, y1: float, x2: float, y2: float) -> _Rule:
    return _Rule(round(x1), round(y1), round(x2), round(y2))


def _curves(points: Mapping[str, Sequence[tuple[float, float]]]) -> Iterator[_Curve]:
    """Yield the gates' curves; names whose ends are near each other stand below one another."""
    ends = sorted((at[-1][1], number, name) for number, (name, at) in enumerate(points.items()))
    heights, free = {}, float(TOP)
    for y, _, name in ends:
        free = max(y, free)
        heights[name] = round(free)
        free += LINE
    for number, (name, at) in enumerate(points.items()):
        yield _Curve(name, number % STYLES, _joined(at), heights[name])


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
