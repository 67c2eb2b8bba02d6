"""The command `reproduce`: train a run again and compare."""

from pathlib import Path
from typing import Annotated

import typer

from unipelt_cli.commands.shared import options, run_argument, settings
from unipelt_cli.errors import CheckError
from unipelt_cli.runs.opening import open_run
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json


def reproduce(
    run: options.RunPath,
    source: options.SourceOption = None,
    model: options.MovedModelOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. (default RUN-reproduced)")
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a run again from its own settings, and say what differs.

    Example: unipelt reproduce runs/mrpc-k500-unipelt-apl-minilm-d111-s42
    """
    settings.refuse_processes("reproduce")
    original = open_run(
        run_argument.locate(run, offline), offline=offline, source=source, model=model
    )
    from unipelt_cli.commands.shared import live_training
    from unipelt_cli.runs import verification
    from unipelt_cli.runs.names import RESULT
    from unipelt_cli.runs.run import read_run
    from unipelt_cli.training.session import Mode

    target = out or run_argument.default_output(run, "reproduced")
    mode: Mode = "new" if (target / RESULT).is_file() else "resume"
    with verification.as_trained(original):
        experiment = original.as_it_was().moved(settings.absolute(source), model)
        live_training.train(experiment, target, mode)
    again = read_run(target)
    differences, is_equal = (
        verification.differences(original, again),
        verification.is_equal(original, again),
    )
    if differences:
        shown = [[d.what, tables.cell(d.original), tables.cell(d.here)] for d in differences]
        tables.table(("", str(run), str(target)), shown)
    if is_equal:
        console.reply("reproduced: the same scores and, to the byte, the same tensors")
    if as_json:
        print_json(
            {
                "run": str(run),
                "reproduction": str(target),
                "equal": is_equal,
                "differences": differences,
            }
        )
    if not is_equal:
        raise CheckError(
            f"{run}: not reproduced in {target}",
            "see what differs above; equal bytes need fp32, the same machine and versions",
        )
