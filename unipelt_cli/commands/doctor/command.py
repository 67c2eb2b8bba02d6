"""The command `doctor`: show every check, and fail where one that training needs does."""

from typing import Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.errors import CheckError
from unipelt_cli.terminal import console, tables
from unipelt_cli.terminal.command_group import print_json


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A backbone to look at too: NAME, DIR or minilm."),
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Check this machine and installation: what works, what is missing, and how to mend it.

    Example: unipelt doctor bert-base-uncased
    """
    from unipelt_cli.commands.doctor import examination

    checks = list(examination.examine(model, offline=offline, terminal=console.terminal()))
    tables.check_table(
        [(check.what, check.ok, check.outcome) for check in checks],
        [check.remedy for check in checks],
        "-",
    )
    needed = [check for check in checks if check.ok is False and check.is_needed]
    if as_json:
        print_json(
            {
                "ok": not needed,
                "checks": [
                    {
                        "what": check.what,
                        "ok": check.ok,
                        "found": check.outcome,
                        "remedy": check.remedy,
                    }
                    for check in checks
                ],
            }
        )
    if needed:
        raise CheckError(
            f"{len(needed)} of {len(checks)} checks failed that training needs, the first: "
            f"{needed[0].what}: {needed[0].outcome}",
            needed[0].remedy or "see above",
        )
