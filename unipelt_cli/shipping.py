"""The command that hands a run to other tools."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from unipelt_cli import arguments, options, render
from unipelt_cli.errors import CheckError, ConfigError, nearest
from unipelt_cli.shell import print_json


def export(
    run: options.RunPath,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="adapters or hf.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. (default RUN-FORMAT)")
    ] = None,
    static_gates: Annotated[
        bool,
        typer.Option(
            "--static-gates",
            help="Make every gate a constant, its mean over train, and drop submodules that dev "
            "does not miss.",
        ),
    ] = False,
    cost: Annotated[
        float | None,
        typer.Option(min=0.0, help="The dev score that --static-gates may cost. (default 0.01)"),
    ] = None,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Write a run in another tool's format, and check that it computes the same there.

    Example: unipelt export RUN --to adapters
    """
    if to not in ("adapters", "hf"):
        raise ConfigError(f"--to {to!r}: no such format", nearest(to, ("adapters", "hf")))
    if not static_gates and (given := arguments.said("--cost", cost)):
        raise ConfigError(f"{given}: only --static-gates costs anything", "give that too")
    found = arguments.read_run(run, offline, source, model)
    tuned = found.build("cpu", model)
    from unipelt_cli import export as exports

    static = None
    if static_gates:
        from unipelt_cli.static import COST, make_static

        rows = partial(found.rows, source=arguments.absolute(source))
        most = COST if cost is None else cost
        made = make_static(found, tuned, rows, cost=most, only=exports.HOLDS.get(to))
        found, tuned, static = made.run, made.tuned, made.report
        render.static_summary(static)
    report = exports.export(found, tuned, to, out or arguments.beside(run, to))
    parity = report["parity"]
    render.say(
        f"{to}: ",
        (report["path"], "bold"),
        f", largest logit difference {parity['max_abs_logit_diff']:.1e} over {parity['rows']} rows",
    )
    for note in report["notes"]:
        render.say(("note: ", "yellow"), note)
    if as_json:
        print_json(report if static is None else report | {"static": static})
    if not exports.holds(parity):
        raise CheckError(
            f"{report['path']}: logits differ by {parity['max_abs_logit_diff']:.2g}",
            "do not use this export; please report it with the run's experiment.toml",
        )
