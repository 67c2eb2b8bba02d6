"""What people see: tables, progress and pictures."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, cast

from rich.console import Console, JustifyMethod
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

from unipelt_cli.errors import RunError

BLOCKS = " ▏▎▍▌▋▊▉█"
BAR_CELLS = 6
_is_hushed = False


class _Talk(io.TextIOBase):
    """Standard error, whose reader may go or whose disk may fill: talk must not end a run."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._try(lambda: sys.stderr.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: sys.stderr.flush())

    def isatty(self) -> bool:
        return bool(self._try(lambda: sys.stderr.isatty()))

    def fileno(self) -> int:
        return sys.stderr.fileno()

    def _try(self, do: Callable[[], Any]) -> Any:
        try:
            return None if sys.stderr is None or _is_hushed else do()
        except (OSError, ValueError):
            discard(sys.stderr)
            return None


def hush() -> None:
    """Say nothing from now on: of several processes of one run, one talks."""
    global _is_hushed  # as the streams are the process's
    _is_hushed = True


def is_hushed() -> bool:
    """Say whether another process talks, and answers, in this one's place."""
    return _is_hushed


def discard(stream: Any) -> None:
    """Send what a stream still holds, and all that comes, nowhere: Python ends without a word."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console() -> Console:
    """Return the console for talk: stderr, 80 columns where nobody says otherwise."""
    width = None if os.environ.get("COLUMNS") or _is_terminal() else 80
    return Console(file=_talk(), width=width, highlight=False, soft_wrap=False)


def _is_terminal() -> bool:
    return Console(file=_talk()).is_terminal


def _talk() -> IO[str]:
    return cast(IO[str], _Talk())


def error(message: str, hint: str) -> None:
    """Print what is wrong and what to do, each on a line of its own."""
    out = Console(file=_talk(), highlight=False, soft_wrap=True)
    out.print(Text.assemble(("error: ", "bold red"), plain(message)))
    out.print(Text.assemble(("hint: ", "bold cyan"), plain(hint)))


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line of talk; what comes from data or names is never read as markup."""
    clean = [(plain(p[0]), p[1]) if isinstance(p, tuple) else plain(p) for p in parts]
    console().print(Text.assemble(*clean), soft_wrap=True)


def plain(text: str) -> str:
    """Make control characters visible, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a plain table: first column left, numbers right."""
    view = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        numeric = bool(rows) and all(is_number(str(row[place])) for row in rows)
        justify: JustifyMethod = "right" if numeric else "left"
        view.add_column(Text(plain(column)), justify=justify, overflow="fold")
    for row in rows:
        view.add_row(*(Text(plain(c)) if isinstance(c, str) else c for c in row))
    console().print(view)


def check_table(checks: Sequence[tuple[str, bool | None, str]]) -> None:
    """Print what was checked: whether it holds, and what was found."""
    words = {
        True: Text("ok", "green"),
        False: Text("FAILED", "bold red"),
        None: Text("not checked"),
    }
    table(("check", "", "found"), [[what, words[passed], said] for what, passed, said in checks])


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
            disable=not self.console.is_terminal,
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
            console=self.console, transient=True, auto_refresh=False, redirect_stderr=False
        )

    def __enter__(self) -> "SweepView":
        if self.console.is_terminal:
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
        if not self.console.is_terminal:
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
    rows = []
    for name, split in manifest["splits"].items():
        labels = split["labels"]
        shown = "  ".join(f"{label} {_short(count)}" for label, count in labels.items())
        words = split["words"]
        rows.append([name, str(split["rows"]), str(words["p50"]), str(words["max"]), shown])
    table(("split", "rows", "words", "max", "labels"), rows)
    for note in (*manifest["notes"], *_repeated(manifest)):
        say(("note: ", "yellow"), note)


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


def gate_table(layers: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print gates as layers x submodules: a bar, the mean and the spread; not all have each."""
    names = [name for name in layers[0] if name != "layer"]
    say(title)
    view = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    view.add_column("layer", justify="right")
    for name in names:
        view.add_column(name)
    for layer in layers:
        cells = [_gate_cell(layer[name]) if name in layer else Text() for name in names]
        view.add_row(str(layer["layer"]), *cells)
    console().print(view)


def _gate_cell(values: Mapping[str, float]) -> Text:
    mean, std = values["mean"], values["std"]
    colour = ("blue", "cyan", "green", "yellow", "red")[min(4, int(mean * 5))]
    return Text.assemble((_bar(mean), colour), f" {mean:.2f} ±{std:.2f}")


def _bar(share: float) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (BLOCKS[rest] if rest else "")).ljust(BAR_CELLS, "·")


def plot_gates(layers: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the gates' means as a picture, layers upwards; the file's ending chooses the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from unipelt_cli import artifact

    names = [name for name in layers[0] if name != "layer"]
    means = [[layer[name]["mean"] if name in layer else nan for name in names] for layer in layers]
    size = (1.2 * len(names) + 2.2, 0.38 * len(layers) + 1.4)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10, parse_math=False)
    for row, values in enumerate(means):
        for column, value in enumerate(values):
            shade = "white" if value < 0.6 else "black"
            shown = "" if isnan(value) else f"{value:.2f}"
            axes.text(column, row, shown, ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(image, ax=axes, label="gate")
    try:
        with artifact.replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
    except ValueError as failure:
        raise RunError(
            f"{path}: cannot be drawn ({failure})", "give a path ending in .png, .pdf or .svg"
        ) from None
    finally:
        pyplot.close(figure)
