"""The command `prepare`: draw rows by the protocol and store them."""

import re
from pathlib import Path
from typing import Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.commands.shared.data_flags import DataFlags, takes_data
from unipelt_cli.commands.shared.settings import resolve_settings
from unipelt_cli.errors import ConfigError
from unipelt_cli.terminal import console, summaries
from unipelt_cli.terminal.command_group import print_json


@takes_data("tasks", "data_seeds", "prepared")
def prepare(
    data: DataFlags,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="data.KEY=VALUE", help="Any other data setting."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to. (default prepared/TASK-kK-dSEED)"),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Draw train, dev and test rows by the protocol and store them with a manifest.

    Example: unipelt prepare --task mrpc --k 500 --source glue/
    """
    resolved = resolve_settings([], settings, data.settings(), offline=offline, data_only=True)
    from unipelt_cli.data import preparation
    from unipelt_cli.data.prepared_directory import save_prepared

    chosen = resolved.experiment.data
    if len(chosen.each()) > 1:
        raise ConfigError("`prepare` draws one task's rows", "run it for each task, with --task")
    prepared = preparation.prepare(chosen, resolved.files)
    name = f"{prepared.task.name}-k{chosen.k or 'all'}-d{chosen.data_seed}"
    # A task's name may be a stranger's, and say "../".
    target = out or Path("prepared") / re.sub(r"[^\w.-]+", "-", name)
    save_prepared(prepared, target)
    summaries.data_summary(prepared.manifest, is_answer=True)
    console.reply("prepared: ", (str(target), "bold"))
    if as_json:
        print_json({"path": str(target), **prepared.manifest})
