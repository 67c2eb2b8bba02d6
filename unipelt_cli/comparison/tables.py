"""A comparison's answer as tables of text, for the terminal and for documents alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Answer = dict[str, Any]
ABSENT = "-"


@dataclass(frozen=True)
class Sheet:
    """A table with a title; where it is `grouped`, rows with one first cell belong together."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    grouped: bool = False
    note: str = ""


def sheets(answer: Answer) -> Iterator[Sheet]:
    """Yield all tables of a comparison that have a row."""
    for table in answer["tables"]:
        groups = _groups(answer, table["backbone"], table["k"])
        place = f"{table['backbone']}, {_k(table['k'])}"
        yield _scores(table, groups, place)
        yield _cells(groups, place)
        yield _costs(table, groups, place)
        if table["bounds"]:
            yield _bounds(table["bounds"], place)
    yield from _comparisons(answer)
    if answer["against"] is not None:
        yield from _against(answer["against"])


def notes(answer: Answer) -> list[str]:
    """Return what a reader should know of the runs: which were left out, and other doubts."""
    found, told = answer["runs"], []
    if unusable := found["unusable"]:
        first = unusable[0]
        count = f"{len(unusable)} run{'s' if len(unusable) > 1 else ''}"
        told.append(f"{count} left out, such as {first['run']}: {first['why']}")
    if repeated := found["repeated"]:
        told.append(f"{len(repeated)} of the same experiment as another, such as {repeated[0]}")
    against = answer["against"] or {"notes": []}
    return [*told, *answer["notes"], *against["notes"]]


def _groups(answer: Answer, backbone: str, k: int | None) -> list[Answer]:
    return [g for g in answer["groups"] if (g["backbone"], g["k"]) == (backbone, k)]


def _k(k: int | None) -> str:
    return "all rows" if k is None else f"k = {k}"


def _ks(ks: Sequence[int | None]) -> str:
    return _k(ks[0]) if len(ks) == 1 else "k = " + ", ".join(str(k or "all") for k in ks)


def score(value: float | None) -> str:
    """Write a fraction, or what stands for none."""
    return ABSENT if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.4f}"


def _interval(ends: Sequence[float] | None) -> str:
    return ABSENT if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _scores(table: Answer, groups: Sequence[Answer], place: str) -> Sheet:
    """Set methods against tasks: mean, deviation, and how many runs collapsed."""
    found = {(group["label"], group["task"]): group for group in groups}
    metric = {group["task"]: group["metric"] for group in groups}
    several = len(table["averaged_tasks"]) > 1
    rows = []
    for entry in table["methods"]:
        cells = [_score_cell(found.get((entry["label"], task))) for task in table["tasks"]]
        rank = entry["average_rank"]
        ranked = (score(entry["average"]), ABSENT if rank is None else f"{rank:.1f}")
        rows.append((entry["label"], *cells, *(ranked if several else ())))
    floor = table["floor"]
    if floor is not None and floor["of"] == "notes":
        cells = [score(floor["means"][task]) for task in table["tasks"]]
        ranked = (score(floor["average"]), ABSENT)
        rows.append((f"({floor['method']})", *cells, *(ranked if several else ())))
    columns = [f"{task} {metric[task]}" for task in table["tasks"]]
    note = "± standard deviation over seeds"
    if floor is not None and floor["of"] == "notes":
        note += f"; ({floor['method']}): what the runs noted of it on their rows"
    if any(group["collapsed"] for group in groups):
        note += "; 2c: two of the runs collapsed, they predict one answer for every row"
    named = {group["task"]: group["positive"] for group in groups if "positive" in group}
    note += "".join(f"; f1 of {task} is that of {label!r}" for task, label in named.items())
    if several and len(table["averaged_tasks"]) < len(table["tasks"]):
        note += "; tasks scored in mse are not averaged"
    return Sheet(
        f"{place}: test scores, mean over seeds",
        ("method", *columns, *(("average", "rank") if several else ())),
        tuple(rows),
        note=note,
    )


def _score_cell(group: Answer | None) -> str:
    if group is None:
        return ABSENT
    deviation = group["standard_deviation"]
    spread = "" if deviation is None else f" ±{deviation:.4f}"
    collapsed = f" {group['collapsed']}c" if group["collapsed"] else ""
    return f"{group['mean']:.4f}{spread}{collapsed}"


def _cells(groups: Sequence[Answer], place: str) -> Sheet:
    rows = [
        (
            f"{group['task']} ({group['metric']})",
            group["label"],
            str(len(group["seeds"])),
            score(group["mean"]),
            _interval(group["interval"]),
            _interval(group["interval_by_rows"]),
            str(group["collapsed"]),
            score(group["mean_not_collapsed"]),
        )
        for group in groups
    ]
    return Sheet(
        f"{place}: how sure each mean is, with 95 % intervals",
        ("task", "method", "n", "mean", "over seeds", "over rows", "coll.", "others"),
        tuple(rows),
        grouped=True,
        note="n: seeds; coll.: collapsed runs; others: the mean of the runs that did not collapse",
    )


def _costs(table: Answer, groups: Sequence[Answer], place: str) -> Sheet:
    """Sum a method's runs up over tasks: the same numbers train, whatever the task."""
    rows = []
    for label in (entry["label"] for entry in table["methods"]):
        own = [group for group in groups if group["label"] == label]
        row = (
            f"{own[0]['trainable_parameters']:,}",
            f"{own[0]['stored_parameters']:,}",
            f"{median(group['median_seconds'] for group in own):.1f}",
            f"{max(group['peak_memory_bytes'] for group in own) / 2**20:,.0f}",
        )
        rows.append((label, *row))
    return Sheet(
        f"{place}: what a run costs",
        ("method", "trainable", "stored", "seconds", "MiB"),
        tuple(rows),
        note="numbers beside the head; median seconds over runs, then tasks; peak of memory",
    )


def _bounds(bounds: Sequence[Answer], place: str) -> Sheet:
    rows = [
        (
            bound["label"],
            str(len(bound["tasks"])),
            score(bound["bound"]),
            score(bound["union"]),
            _signed(bound["difference"]),
            ", ".join(bound["missing"]) or "none",
        )
        for bound in bounds
    ]
    return Sheet(
        f"{place}: unions against the best of their submodules alone, task by task",
        ("union", "tasks", "best alone", "union's", "difference", "parts without runs"),
        tuple(rows),
    )


def _comparisons(answer: Answer) -> Iterator[Sheet]:
    margin = answer["margin"]
    scopes = dict.fromkeys((c["backbone"], tuple(c["ks"])) for c in answer["comparisons"])
    for backbone, ks in scopes:
        own = [
            c for c in answer["comparisons"] if (c["backbone"], tuple(c["ks"])) == (backbone, ks)
        ]
        tested = sum(c["p"] is not None for c in own)
        yield Sheet(
            f"{backbone}, {_ks(ks)}: pairs of methods, seed by seed",
            ("method", "against", "difference", "95 % interval", "p", "w/t/l", "verdict"),
            tuple(map(_comparison, own)),
            grouped=True,
            note=f"p by sign flips, Holm-corrected over the tested pairs ({tested}); w/t/l: cells "
            f"won, tied within {margin:g}, lost; seeds: on each task",
        )


def _comparison(entry: Answer) -> tuple[str, ...]:
    one, other = entry["methods"]
    ends = entry["interval"]
    won = ABSENT
    if entry["wins"] is not None:
        won = f"{entry['wins']}/{entry['ties']}/{entry['losses']}"
    return (
        f"{one} minus",
        other,
        _signed(entry["difference"]),
        ABSENT if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}",
        _p(entry["p_holm"]),
        won,
        entry["said"],
    )


def _against(entry: Answer) -> Iterator[Sheet]:
    """Yield what others printed beside ours: cells, averages, costs."""
    name, shared = entry["name"], ("ours", "theirs", "difference")
    cells = [
        (
            f"{cell['task']}, {_k(cell['k'])}, {cell['backbone']}",
            cell["label"],
            str(cell["seeds"]),
            score(cell["ours"]),
            _printed(cell),
            _signed(cell["difference"]),
        )
        for cell in entry["cells"]
    ]
    if cells:
        columns: tuple[str, ...] = ("", "method", "n", *shared)
        yield Sheet(f"against {name}: scores", columns, tuple(cells), grouped=True)
    averages = [
        (
            f"{_k(own['k'])}, {own['backbone']}",
            own["label"],
            *(score(own["ours"]), score(own["theirs"]), _signed(own["difference"])),
        )
        for own in entry["averages"]
    ]
    if averages:
        columns = ("", "method", *shared)
        yield Sheet(f"against {name}: averages", columns, tuple(averages), grouped=True)
    costs = [
        (
            own["backbone"],
            own["label"],
            f"{own['ours_stored']:,}",
            f"{own['theirs_stored']:,}",
            _percent(own["ours_train_time"]),
            _percent(own["theirs_train_time"]),
        )
        for own in entry["costs"]
    ]
    if costs:
        columns = ("", "method", "stored", "theirs", "time", "theirs")
        note = "time: to train, beside full fine-tuning; theirs are rounded"
        yield Sheet(f"against {name}: costs", columns, tuple(costs), grouped=True, note=note)


def _printed(cell: Answer) -> str:
    deviation = cell["their_deviation"]
    return score(cell["theirs"]) + ("" if deviation is None else f" ±{deviation:.4f}")


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share * 100:.0f} %"
