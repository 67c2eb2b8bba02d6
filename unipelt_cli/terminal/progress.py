"""Progress bars: of training, of a sweep, of rows."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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
from unipelt_cli.terminal.tables import duration
from unipelt_cli.text import plain

Item = TypeVar("Item")


def tracked(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield the items, with a bar on a terminal until the last one."""
    out = console()
    columns = TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
    view = Progress(
        *columns,
        console=out,
        transient=True,
        disable=not out.is_terminal,
        redirect_stderr=False,  # the console writes there itself
    )
    with view:
        yield from view.track(items, total=total)


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

    def __init__(self, metric: str, epochs: int, shown: str = "") -> None:
        self.metric, self.epochs, self.shown = metric, epochs, shown or metric
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
        effect = (
            "and train.contrast compares only those"
            if event.compares_rows
            else "steps stay the same"
        )
        line = f"{label}out of memory: batches are computed {size} rows at a time, {effect}"
        self.console.print(Text(line, style="yellow"))

    def epoch(self, event: Mapping[str, Any], label: str = "") -> None:
        """Print an epoch's line; the best so far is marked."""
        score = event["dev"].get(self.metric)
        scored = "dev not scored" if score is None else f"dev {self.shown} {score:.4f}"
        star = " *" if event["is_best"] else ""
        seconds = event["train_seconds"] + event["evaluation_seconds"]
        line = (
            f"{label}epoch {event['epoch']:>2}/{self.epochs}  loss {event['train_loss']:.4f}  "
            f"{scored}  {seconds:5.1f} s{star}"
        )
        self.console.print(Text(line, style="bold" if event["is_best"] else ""))

    def fold(self, result: Mapping[str, Any], label: str) -> None:
        """Print the line of a fold that was trained, and tested on its own rows."""
        score = f"{self.shown} {result['test'][self.metric]:.4f}"
        self.console.print(Text(f"{label}{score}  {result['seconds']:5.1f} s"))


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

    def end(self, name: str, outcome: str, *, failed: bool) -> None:
        """Print the line of a cell that ended."""
        self.ended += 1
        self.failed += failed
        self.done += not failed
        count = f"[{self.done + self.failed}/{self.total}]"
        line = Text.assemble(f"{count} {plain(name)}  ", (plain(outcome), "red" if failed else ""))
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
        for cell, (method, score) in best.items():
            view.add_row(Text(f"best so far on dev, {cell}: {method}"), "", f"{score:.4f}")
        self.live.update(view, refresh=True)

    def _summary(self, running: int) -> str:
        left = self.total - self.done - self.failed
        spent = time.monotonic() - self.start
        time_left = f", {duration(spent / self.ended * left)} left" if self.ended and left else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done}/{self.total} done, {running} running{failed}{time_left}"


@contextmanager
def live() -> Iterator[Callable[..., TrainingView]]:
    """Show a run's progress line until the block ends; the run says its metric and epochs."""
    views: list[TrainingView] = []

    def show(metric: str, epochs: int, shown: str = "") -> TrainingView:
        view = TrainingView(metric, epochs, shown)
        view.progress.start()
        views.append(view)
        return view

    try:
        yield show
    finally:
        for view in views:
            view.progress.stop()
