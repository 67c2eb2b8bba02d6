"""A process that trains what it is told: groups of cells in as lines, what happens out as lines.

Lines are JSON, never pickle. The process that started it may stop it, or vanish: either way what
it trains is left so that it can go on.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import UnipeltError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.system.imports import importing

with importing():
    from unipelt_cli.system import memory
    from unipelt_cli.training import execution
    from unipelt_cli.training.events import Epoch, Failed, Finished, Ready
    from unipelt_cli.training.planning import Shared

Told = dict[str, Any]
"""A cell: its `directory`, and its experiment's `settings`."""
Report = dict[str, Any]
"""What happened to a cell: its `directory`, a `kind`, and what belongs to that kind."""


def carry_out(
    group: Sequence[Told],
    shared: Shared,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train a group of cells; what fails is reported, and the others go on.

    Kinds: "ready" (metric, epochs), "epoch" (epoch, score), "finished" (result), "failed" (error,
    hint), and "stopped" where `is_stopped` said so.
    """
    memory.forget_peak()
    left = {cell["directory"]: cell for cell in group}
    try:
        for report in _together(group, shared, is_stopped):
            if report["kind"] in ("finished", "failed"):
                del left[report["directory"]]
            yield report
    except UnipeltError as error:
        if len(group) == 1:
            yield _failed(group[0]["directory"], error.message, error.hint)
            return
        for cell in left.values():  # one of them cannot begin: the others may
            yield from carry_out([cell], shared, is_stopped)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        hint = "this is a bug in unipelt, or something else broke: see the traceback"
        for cell in left.values():
            yield _failed(cell["directory"], said, hint) | {"traceback": traceback.format_exc()}


def _together(
    group: Sequence[Told], shared: Shared, is_stopped: Callable[[], bool]
) -> Iterator[Report]:
    experiments = [resolve([("", cell["settings"])]) for cell in group]
    directories = [Path(cell["directory"]) for cell in group]
    events = execution.execute_together(experiments, directories, "resume", shared=shared)
    metrics: dict[int, str] = {}
    with closing(events):
        for place, event in events:
            base = {"directory": group[place]["directory"]}
            match event:
                case Ready():
                    metrics[place] = event.metric
                    yield base | {"kind": "ready", "metric": event.metric, "epochs": event.epochs}
                case Epoch():
                    score = event.dev.get(metrics[place])
                    yield base | {"kind": "epoch", "epoch": event.epoch, "score": score}
                case Finished():
                    yield base | {"kind": "finished", "result": event.result}
                case Failed():
                    yield _failed(base["directory"], event.error.message, event.error.hint)
            if is_stopped():
                yield base | {"kind": "stopped"}
                return


def _failed(directory: str, error: str, hint: str) -> Report:
    return {"directory": directory, "kind": "failed", "error": error, "hint": hint}


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
    shared = Shared()
    for line in sys.stdin:
        for report in carry_out(parse_json(line), shared, lambda: asked or os.getppid() != parent):
            _write(out, report)
        _write(out, {"kind": "idle"})
        if asked:
            break


def _write(out: Any, report: Report) -> None:
    """Write a line; where nobody reads any more, the parent is gone and the next event stops."""
    try:
        out.write(json.dumps(report) + "\n")
        out.flush()
    except BrokenPipeError:
        pass


if __name__ == "__main__":
    main()
