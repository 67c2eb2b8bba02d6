"""What people see: tables, progress and pictures."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from unipelt_cli.terminal.console import can_move, console

_CHANGE = ("before", "after")
GAP = 2


def error(message: str, hint: str) -> None:
    """Print what is wrong and what to do, each on a line of its own."""
    out = console()
    out.print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)
    out.print(Text.assemble(("hint: ", "bold cyan"), plain(hint)), soft_wrap=True)


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line of talk; what comes from data or names is never read as markup.

    A terminal's is broken between words, unless a word alone is wider: a path stays whole.
    """
    clean = [(plain(p[0]), p[1]) if isinstance(p, tuple) else plain(p) for p in parts]
    out, line = console(), Text.assemble(*clean)
    fits = out.file.isatty() and max(map(cell_len, line.plain.split()), default=0) <= out.width
    out.print(line, soft_wrap=not fits)


def plain(text: str) -> str:
    """Make control characters visible, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a plain table: first column left, numbers right."""
    out, view = console(), Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        numeric = bool(rows) and all(is_number(str(row[place])) for row in rows)
        justify: JustifyMethod = "right" if numeric else "left"
        name = None if place or not rows else max(cell_len(plain(str(row[0]))) for row in rows)
        least = None if name is None or name > out.width // 2 else name  # names stay whole
        view.add_column(Text(plain(column)), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        view.add_row(*(Text(plain(c)) if isinstance(c, str) else c for c in row))
    out.print(view)


def check_table(
    checks: Sequence[tuple[str, bool | None, str]],
    remedies: Sequence[str | None] = (),
    otherwise: str = "not checked",
) -> None:
    """Print what was checked: whether it holds, what was found, and below it how to mend it."""
    words = {
        True: Text("ok", "green"),
        False: Text("FAILED", "bold red"),
        None: Text(otherwise),
    }
    rows: list[tuple[str, Text, Text]] = []
    for (what, passed, said), remedy in zip_longest(checks, remedies):
        found = Text(plain(said))
        if remedy is not None:
            found = Text.assemble(found, "\n", ("fix: ", "cyan"), plain(remedy))
        rows.append((what, words[passed], found))
    table(("check", "", "found"), rows)


def method_table(entries: Sequence[Mapping[str, Any]], backbone: str) -> None:
    """Print the methods by category, with what they train and store on a backbone."""
    view = Table(box=None, pad_edge=False)
    view.add_column("method", no_wrap=True)
    view.add_column("trainable", justify="right", no_wrap=True)
    view.add_column("stored", justify="right", no_wrap=True)
    view.add_column("merges")
    view.add_column("paper")
    category = None
    for entry in entries:
        if entry["category"] != category:
            category = entry["category"]
            view.add_row(Text(category, style="bold"))
        numbers = [
            "-" if entry[key] is None else f"{entry[key]:,}" for key in ("trainable", "stored")
        ]
        merges = "yes" if entry["mergeable"] else "no"
        view.add_row(Text(f"  {entry['name']}"), *numbers, merges, Text(entry["paper"]))
    console().print(view)
    say(f"counted on {backbone}, the head apart; - where it cannot carry the method")


def cell(value: object) -> str:
    """Write a value of a table's cell for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def is_number(text: str) -> bool:
    """Say whether a cell is a number alone."""
    return text.strip().lstrip("+-").replace(".", "").replace(",", "").replace("%", "").isdigit()


@contextmanager
def counting(what: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that counts what is done; the total and its pace stand on a terminal."""
    out, began, done = console(), time.perf_counter(), 0
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(
        *columns, console=out, transient=True, disable=not (shown and out.is_terminal)
    )
    bar = progress.add_task(f"0 {what}", total=None)

    def count(more: int) -> None:
        nonlocal done
        done += more
        pace = done / (time.perf_counter() - began)
        progress.update(bar, description=f"{done:,} {what}, {pace:,.0f} a second")

    with progress:
        yield count


class TrainingView:
    """One line of progress on a terminal, one line an epoch where there is none."""

    def __init__(self, metric: str, epochs: int) -> None:
        self.metric, self.epochs = metric, epochs
        self.console = console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            # Talk finds its way to stderr by itself: caught and printed again, it never ends.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not can_move(self.console),
        )
        self.bar: TaskID | None = None

    def step(self, event: Any, label: str = "") -> None:
        """Move the bar; a label says which run's step it is, where there are several."""
        if self.bar is None:
            self.bar = self.progress.add_task("", total=event.steps, note="")
        self.progress.update(
            self.bar,
            description=f"{label}epoch {event.epoch:>2}/{self.epochs}",
            completed=event.step,
            total=event.steps,
            note=f"{event.tokens_per_second:,.0f} tokens/s",
        )

    def halved(self, event: Any, label: str = "") -> None:
        """Say that batches are computed in parts from now on."""
        size = event.micro_batch_size
        line = (
            f"{label}out of memory: batches are computed {size} rows at a time, steps stay the same"
        )
        self.console.print(Text(line, style="yellow"))

    def epoch(self, event: Mapping[str, Any], label: str = "") -> None:
        """Print an epoch's line; the best so far is marked."""
        score = event["dev"].get(self.metric)
        scored = "dev not scored" if score is None else f"dev {self.metric} {score:.4f}"
        star = " *" if event["is_best"] else ""
        seconds = event["train_seconds"] + event["evaluation_seconds"]
        line = (
            f"{label}epoch {event['epoch']:>2}/{self.epochs}  loss {event['train_loss']:.4f}  "
            f"{scored}  {seconds:5.1f} s{star}"
        )
        self.console.print(Text(line, style="bold" if event["is_best"] else ""))


class SweepView:
    """A table that moves on a terminal: what runs, how many are done, the best so far.

    Where there is no terminal, a line for each cell that ended.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.ended, self.failed = total, done, 0, 0
        self.start = time.monotonic()
        self.console = console()
        self.live = Live(
            console=self.console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "SweepView":
        if can_move(self.console):
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def end(self, name: str, said: str, *, failed: bool) -> None:
        """Print the line of a cell that ended."""
        self.ended += 1
        self.failed += failed
        self.done += not failed
        count = f"[{self.done + self.failed}/{self.total}]"
        line = Text.assemble(f"{count} {plain(name)}  ", (plain(said), "red" if failed else ""))
        self.console.print(line, soft_wrap=True)

    def show(
        self,
        running: Sequence[tuple[str, str, str]],
        best: Mapping[str, tuple[str, float]],
    ) -> None:
        """Draw what runs now, as (name, epoch, score), and the best method of each task."""
        if not can_move(self.console):
            return
        view = Table(box=None, pad_edge=False)
        view.add_column(self._summary(len(running)), no_wrap=True, overflow="ellipsis", ratio=1)
        view.add_column("epoch", justify="right", no_wrap=True)
        view.add_column("dev", no_wrap=True)
        for row in running:
            view.add_row(*map(plain, row))
        for place, (method, score) in best.items():
            view.add_row(Text(f"best so far on dev, {place}: {method}"), "", f"{score:.4f}")
        self.live.update(view, refresh=True)

    def _summary(self, running: int) -> str:
        left = self.total - self.done - self.failed
        spent = time.monotonic() - self.start
        time_left = f", {duration(spent / self.ended * left)} left" if self.ended and left else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done}/{self.total} done, {running} running{failed}{time_left}"


def duration(seconds: float) -> str:
    """Write a time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


@contextmanager
def live() -> Iterator[Callable[[str, int], TrainingView]]:
    """Show a run's progress line until the block ends; the run says its metric and epochs."""
    views: list[TrainingView] = []

    def show(metric: str, epochs: int) -> TrainingView:
        view = TrainingView(metric, epochs)
        view.progress.start()
        views.append(view)
        return view

    try:
        yield show
    finally:
        for view in views:
            view.progress.stop()


def data_summary(manifest: Mapping[str, Any]) -> None:
    """Print the splits: rows, labels, lengths, and what was noticed about them."""
    columns, rows, counts = ("split", "rows", "words", "max"), [], []
    for name, split in manifest["splits"].items():
        words = split["words"]
        rows.append([name, str(split["rows"]), str(words["p50"]), str(words["max"])])
        labels = split["labels"].items()
        counts.append([f"{plain(label)} {_short(count)}" for label, count in labels])
    used = sum(max(map(len, column)) + GAP for column in zip(columns, *rows, strict=True))
    room = console().width - used
    shown = [[*row, _packed(own, room)] for row, own in zip(rows, counts, strict=True)]
    table((*columns, "labels"), shown)
    for note in (*manifest["notes"], *_repeated(manifest)):
        say(("note: ", "yellow"), note)


def _packed(words: Sequence[str], room: int) -> Text:
    """Put words on lines: each one whole, where it is not longer than a line."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}{' ' * GAP if lines[-1] else ''}{word}"
        if lines[-1] and cell_len(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return Text("\n".join(lines))


def _repeated(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Say, where there are any, which texts the splits hold twice or with several labels."""
    within = ((f"within {name}", split["duplicates"]) for name, split in manifest["splits"].items())
    shared = ((pair.replace("_", " and "), count) for pair, count in manifest["leakage"].items())
    found = [f"{count} {where}" for where, count in (*within, *shared) if count]
    if found:
        yield f"rows with equal texts: {', '.join(found)}"
    if manifest["conflicts"]:
        yield f"texts with more than one label: {manifest['conflicts']}"


def _short(count: float) -> str:
    return str(count) if isinstance(count, int) else f"{count:.2f}"


def result_summary(result: Mapping[str, Any], directory: Path) -> None:
    """Print what a finished run reached and what it costs to keep."""
    rows = [
        [split, "  ".join(f"{name} {value:.4f}" for name, value in result[split].items())]
        for split in ("dev", "test")
    ]
    table(("split", "scores"), rows)
    say(
        f"best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s, ",
        f"{result['stored_parameters'] + result['head_parameters']:,} numbers stored ",
        f"({result['artifact_bytes'] / 1e6:.2f} MB)",
    )
    if result["collapsed"]:
        say(("warning: ", "yellow"), "the run predicts the same for every test row: it collapsed")
    say("run: ", (str(directory), "bold"))


def runs_summary(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what several finished runs reached, one line each under its label, and their mean."""
    first = next(iter(results.values()))
    shown = [("dev", first["metric"]), *(("test", name) for name in first["test"])]
    columns = ("run", *(" ".join(one) for one in shown))
    scores = {
        label: [result[split][name] for split, name in shown] for label, result in results.items()
    }
    rows = [[label, *(f"{value:.4f}" for value in own)] for label, own in scores.items()]
    if len(rows) > 1:
        spread = [
            f"{mean(own):.4f} ±{stdev(own):.4f}" for own in zip(*scores.values(), strict=True)
        ]
        rows.append(["mean", *spread])
    table(columns, rows)
    for label, result in results.items():
        if result["collapsed"]:
            say(("warning: ", "yellow"), f"{label} predicts the same for every test row")


def static_summary(report: Mapping[str, Any]) -> None:
    """Print what constant gates and dropped submodules cost, and what they gain."""
    rows = [
        [f"{split} {report['metric']}", *(f"{report[split][when]:.4f}" for when in _CHANGE)]
        for split in ("dev", "test")
    ]
    rows += [
        [what, *(f"{report[key][when]:,.0f}" for when in _CHANGE)]
        for what, key in (("numbers stored", "stored_parameters"), ("rows/s", "rows_per_second"))
    ]
    table(("constant gates", *_CHANGE), rows)
    dropped = ", ".join(report["dropped"]) or "nothing"
    say(f"dropped: {dropped}")
