"""A sweep shown live: which cells run, what ended, and a clean stop."""

from collections.abc import Iterator
from typing import Any

from unipelt_cli.metrics import loses_to_mean
from unipelt_cli.sweeps.sweep import Engine, Standing, Sweep, best_so_far
from unipelt_cli.system.processes import ALONE
from unipelt_cli.terminal import console, progress
from unipelt_cli.terminal.interrupts import stop_on_request
from unipelt_cli.text import shown_score

SPLITS = ("dev", "test")


def train_cells(plan: Sweep, engine: Engine, size: int, *, retry: bool) -> dict[str, Any]:
    """Train what is left of a sweep and return its finished and failed cells.

    Raises KeyboardInterrupt after a request to stop: the same command goes on from there.
    """
    done = len(plan.of("finished"))
    total = len(plan.standings)
    known = 0 if retry else len(plan.of("failed"))
    if done or known:
        console.say(f"{done} of {total} cells are finished already" + _failed_already(known))
    is_over = not plan.left(retry=retry)
    with stop_on_request(ALONE) as is_stopped:
        if not is_over:
            _watch_cells(plan, plan.run(engine, size, is_stopped, retry=retry), total - known, done)
        if is_stopped() and plan.of("waiting", "interrupted"):
            console.say(("interrupted", "yellow"), ": the same command goes on from there")
            raise KeyboardInterrupt
    return {
        "sweep": str(plan.directory),
        "cells": total,
        "runs": [
            {"run": str(plan.directory / one.cell.name), **one.result}
            for one in plan.of("finished")
            if one.result is not None
        ],
        "failed": [
            {
                "run": str(plan.directory / one.cell.name),
                "error": one.error,
                "hint": one.hint,
            }
            for one in plan.of("failed")
        ],
    }


def _failed_already(count: int) -> str:
    return f", {count} have failed: --retry tries them again" if count else ""


def _watch_cells(plan: Sweep, moves: Iterator[Standing | None], total: int, done: int) -> None:
    with progress.SweepView(total, done) as view:
        for one in moves:
            if one is not None and one.status == "finished" and one.result is not None:
                name, result, metric = one.cell.name, one.result, one.result["metric"]
                scored = [split for split in SPLITS if result[split]]
                scores = "  ".join(f"{split} {result[split][metric]:.4f}" for split in scored)
                collapsed = ", collapsed" if result["collapsed"] else ""
                named = shown_score(metric, result.get("positive"))
                loses = any(map(loses_to_mean, result.get("against_mean", {}).values()))
                mean = ", no better than the train mean" if loses else ""
                said = f"{named} {scores}  {result['seconds']:.0f} s{collapsed}{mean}"
                view.end(name, said, failed=False)
            elif one is not None and one.status == "failed":
                view.end(one.cell.name, f"failed: {one.error}", failed=True)
            running = [
                (
                    own.cell.name,
                    f"{own.epoch}/{own.epochs}",
                    "" if own.score is None else f"{own.metric} {own.score:.4f}",
                )
                for own in plan.of("running")
            ]
            view.show(running, best_so_far(plan.of("finished")))
