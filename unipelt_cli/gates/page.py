"""A run's gates as one HTML page that loads nothing and runs nothing: it opens anywhere, for ever.

Which class is shown is the address's fragment (`#class=2`), by style alone. Every name is escaped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from unipelt_cli.errors import ConfigError
from unipelt_cli.files import atomic
from unipelt_cli.gates.report import Layers, gate_names, over_layers
from unipelt_cli.text import plain

Answer = Mapping[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")
FORMATS = (".html", ".htm")
LEAST_LOSS = 0.01  # what the strongest cell of an ablation loses at least
WIDTH, HEIGHT = 720, 260  # of the lines over epochs
LEFT, RIGHT, TOP, BOTTOM = 34, 110, 10, 34  # their margins
LINE = 16  # between two names of lines
STYLES = 5  # of lines, in the template


def check(path: Path) -> None:
    """Raise ConfigError for a file whose ending names no page."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--html {str(path)!r}: no such format", "give a path ending in .html")


def write(answer: Answer, title: str, path: Path) -> None:
    """Write an answer's layers and classes, and the ablation and epochs that it may hold."""
    classes = answer["classes"]
    links = [f'a[href="#class={place}"]' for place in range(1, len(classes) + 1)]
    chosen = [
        f'body:has([id="class={place}"]:target) {link}' for place, link in enumerate(links, 1)
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escaped(title),
        chosen=", ".join(['body:not(:has(.class:target)) a[href="#all"]', *chosen]),
        body="\n".join(_body(answer)),
        data=_data(answer),
    )
    atomic.write(path, page.encode())


def _body(answer: Answer) -> Iterator[str]:
    split = answer["split"]
    yield (
        f"<p>Mean gate of each layer's submodules over {answer['rows']} {split} rows: "
        "0 is closed, 1 open. Point at a cell, or reach it with the Tab key, for more.</p>"
    )
    named = list(enumerate(answer["classes"], 1))
    if named:
        yield '<nav aria-label="rows"><a href="#all">all rows</a>'
        yield from (f'<a href="#class={n}">{_escaped(own["class"])}</a>' for n, own in named)
        yield "</nav>"
    lost = _lost(answer)
    for number, own in named:
        heading = f"{own['class']}: {own['rows']} {split} rows"
        yield f'<section class="class" id="class={number}"><h2>{_escaped(heading)}</h2>'
        yield from _gates(own["layers"], lost)
        yield "</section>"
    if answer["layers"]:
        yield f'<section id="all"><h2>all {answer["rows"]} {split} rows</h2>'
        yield from _gates(answer["layers"], lost)
        yield "</section>"
    if "ablation" in answer:
        yield from _ablation(answer["ablation"])
    if answer.get("epochs"):
        yield from _epochs(answer["epochs"])


def _gates(layers: Layers, lost: Mapping[tuple[int, str], str]) -> Iterator[str]:
    names = gate_names(layers)
    rows = []
    for own in layers:
        cells = []
        for name in names:
            if name in own:
                place = own["layer"], name
                detail = f"layer {place[0]} {name}\n{_numbers(own[name])}{lost.get(place, '')}"
                cells.append(_cell(f"{own[name]['mean']:.2f}", own[name]["mean"], detail))
            else:
                cells.append('<td class="none"></td>')
        rows.append((str(own["layer"]), cells))
    yield _table("gates", names, rows)


def _numbers(values: Mapping[str, float]) -> str:
    quantiles = "  ".join(f"{n} {values[n]:.2f}" for n in ("min", "p05", "median", "p95", "max"))
    return (
        f"mean {values['mean']:.3f} ± {values['std']:.3f}\n{quantiles}\n"
        f"entropy {values['entropy']:.2f} bits, undecided {values['undecided']:.2f}"
    )


def _lost(answer: Answer) -> dict[tuple[int, str], str]:
    """Return what closing a gate's submodule loses, as a line; LoRA's two gates share theirs."""
    if "ablation" not in answer:
        return {}
    ablation = answer["ablation"]
    return {
        (own["layer"], name): f"\nclosed: {own[part]['lost']:.4f} {ablation['metric']} lost"
        for own in ablation["layers"]
        for part in own
        if part != "layer"
        for name in (part, f"{part}_query", f"{part}_value")
    }


def _ablation(ablation: Answer) -> Iterator[str]:
    metric, names = ablation["metric"], list(ablation["all"])
    rows = [{"layer": "all", **ablation["all"]}, *ablation["layers"]]
    most = max(LEAST_LOSS, *(own[n]["lost"] for own in rows for n in names if n in own))
    yield f"<h2>What closing a submodule loses</h2><p>{_escaped(ablation['says'])}.</p>"
    shown = []
    for own in rows:
        cells = []
        for name in names:
            if name in own:
                values = own[name]
                flips = "" if values["flips"] is None else f"\n{values['flips']} labels change"
                gate = "" if values["gate"] is None else f"\nmean gate {values['gate']:.3f}"
                place = "all layers" if own["layer"] == "all" else f"layer {own['layer']}"
                scores = f"{metric} {ablation['score']:.4f}, closed {values['score']:.4f}"
                detail = f"{place} {name}\n{scores}{flips}{gate}"
                lost = values["lost"]
                cells.append(_cell(f"{lost + 0.0:.4f}", max(0.0, lost) / most, detail))
            else:
                cells.append('<td class="none"></td>')
        shown.append((str(own["layer"]), cells))
    yield _table("lost", names, shown)


def _table(kind: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in names)
    body = "\n".join(
        f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>' for label, cells in rows
    )
    return f'<table class="{kind}">\n<tr><th scope="col">layer</th>{head}</tr>\n{body}\n</table>'


def _cell(text: str, share: float, detail: str) -> str:
    """Return a cell as dark as its share, whose detail shows where it is pointed at or focused."""
    percent = round(100 * share)
    over = " ".join(f"over{bound}" for bound in (45, 62) if percent >= bound)
    return (
        f'<td tabindex="0" class="{over}" style="--share:{percent}">{text}'
        f"<span>{_escaped(detail)}</span></td>"
    )


def _epochs(epochs: Sequence[Answer]) -> Iterator[str]:
    """Draw each gate's mean over layers after each epoch, named at the line's end."""
    shown = [(own["epoch"], over_layers(own["layers"])) for own in epochs if own["layers"]]
    first, last = shown[0][0], shown[-1][0]

    def across(epoch: int) -> float:
        share = (epoch - first) / max(1, last - first)
        return LEFT + (WIDTH - LEFT - RIGHT) * float(share)

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)

    yield "<h2>Over epochs</h2>"
    yield "<p>Mean over layers and dev rows; the upright line is the best epoch.</p>"
    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="gates over epochs">'
    for value in (0.0, 0.5, 1.0):
        yield _rule(LEFT, down(value), WIDTH - RIGHT, down(value))
        yield f'<text x="{LEFT - 6}" y="{down(value) + 4:.0f}" text-anchor="end">{value:g}</text>'
    best = [own["epoch"] for own in epochs if own["is_best"]]
    for epoch in best:
        yield _rule(across(epoch), TOP, across(epoch), HEIGHT - BOTTOM)
    for epoch in sorted({first, last, *best}):
        yield (
            f'<text x="{across(epoch):.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{epoch}</text>"
        )
    ends: list[tuple[float, int, str]] = []
    for number, name in enumerate(gate_names([means for _, means in shown])):
        at = [(across(epoch), down(means[name])) for epoch, means in shown if name in means]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        yield f'<polyline class="line{number % STYLES}" points="{points}"/>'
        ends.append((at[-1][1], number, name))
    free = float(TOP)
    for y, number, name in sorted(ends):
        free = max(y, free)
        x = WIDTH - RIGHT + 8
        yield (
            f'<polyline class="line{number % STYLES}" points="{x},{free:.0f} {x + 20},{free:.0f}"/>'
            f'<text x="{x + 26}" y="{free + 4:.0f}">{_escaped(name)}</text>'
        )
        free += LINE
    yield "</svg>"


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}"/>'


def _escaped(text: str) -> str:
    """Make text safe inside an element or an attribute, line breaks kept."""
    return "\n".join(escape(plain(line)) for line in text.split("\n"))


def _data(answer: Answer) -> str:
    """Return the answer as JSON in which nothing can end the element around it."""
    return json.dumps(answer).replace("<", "\\u003c").replace(">", "\\u003e")
