"""A process that trains what it is told: groups of cells in as lines, what happens out as lines.

Lines are JSON, never pickle. The process that started it may stop it, or vanish: either way what
it trains is left so that it can go on.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import UnipeltError
from unipelt_cli.sweeps.cell_reports import (
    CellEnd,
    CellEpoch,
    CellFailed,
    CellFinished,
    CellReady,
    CellReport,
    CellSpec,
    CellStopped,
    dump_report,
    parse_group,
)
from unipelt_cli.system.imports import importing

with importing():
    from unipelt_cli.system import memory
    from unipelt_cli.training import execution
    from unipelt_cli.training.events import Epoch, Failed, Finished, Ready
    from unipelt_cli.training.planning import RowCache


def carry_out(
    group: Sequence[CellSpec],
    shared: RowCache,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[CellReport]:
    """Train a group of cells; what fails is reported, and the others go on."""
    memory.forget_peak()
    left = {cell.directory: cell for cell in group}
    try:
        for report in _together(group, shared, is_stopped):
            if isinstance(report, CellEnd):
                del left[report.directory]
            yield report
    except UnipeltError as error:
        if len(group) == 1:
            yield CellFailed(group[0].directory, error.message, error.hint)
            return
        for cell in left.values():  # one of them cannot begin: the others may
            yield from carry_out([cell], shared, is_stopped)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        hint = "this is a bug in unipelt, or something else broke: see the traceback"
        for cell in left.values():
            yield CellFailed(cell.directory, message, hint, traceback.format_exc())


def _together(
    group: Sequence[CellSpec], shared: RowCache, is_stopped: Callable[[], bool]
) -> Iterator[CellReport]:
    experiments = [resolve([("", cell.settings)]) for cell in group]
    directories = [Path(cell.directory) for cell in group]
    events = execution.execute_together(experiments, directories, "resume", shared=shared)
    metrics: dict[int, str] = {}
    with closing(events):
        for index, event in events:
            directory = group[index].directory
            match event:
                case Ready():
                    metrics[index] = event.metric
                    yield CellReady(directory, event.metric, event.epochs)
                case Epoch():
                    yield CellEpoch(directory, event.epoch, event.dev.get(metrics[index]))
                case Finished():
                    yield CellFinished(directory, event.result)
                case Failed():
                    yield CellFailed(directory, event.error.message, event.error.hint)
            if is_stopped():
                yield CellStopped(directory)
                return


def main() -> None:
    """Read groups from stdin until it ends, one JSON list a line; write reports to stdout."""
    import torch

    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process says when to stop
    torch.set_num_threads(int(sys.argv[1]))
    parent, out = os.getppid(), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like a report
    shared = RowCache()
    for line in sys.stdin:
        group = parse_group(line)
        for report in carry_out(group, shared, lambda: asked or os.getppid() != parent):
            _write(out, report)
        _write(out, None)
        if asked:
            break


def _write(out: IO[str], report: CellReport | None) -> None:
    """Write a line; where nobody reads any more, the parent is gone and the next event stops."""
    try:
        out.write(dump_report(report))
        out.flush()
    except BrokenPipeError:
        pass


if __name__ == "__main__":
    main()
