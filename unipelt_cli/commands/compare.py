"""The command `compare`: finished runs beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from unipelt_cli.commands.shared import options
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal.command_group import print_json


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Runs, or directories that hold runs.")
    ],
    published: Annotated[
        str | None,
        typer.Option("--against", metavar="paper", help="Set the paper's scores beside these."),
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="A difference in score that does not matter.")
    ] = 0.01,
    write: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also as .md, .tex, .csv or .json; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw .png, .svg or .pdf.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare methods over tasks and seeds: means, intervals, paired tests, costs.

    Example: unipelt compare runs/ --against paper --write table.md
    """
    from unipelt_cli.comparison import documents
    from unipelt_cli.comparison.plot import plot_comparison
    from unipelt_cli.comparison.tables import notes, sheets
    from unipelt_cli.files.pictures import check_ending
    from unipelt_cli.system import network

    for path in write or ():
        documents.check(path)
    if plot is not None:
        check_ending(plot)
    network.configure_network(offline=True, needed=False)
    with importing():
        from unipelt_cli.comparison import summary
    from unipelt_cli.comparison.published import read_published
    from unipelt_cli.terminal import comparison
    from unipelt_cli.terminal.console import say

    table = None if published is None else read_published(published)
    result = summary.summarise_directories(directories, margin, table)
    for path in write or ():
        documents.write(result, path)
        say("written: ", (str(path), "bold"))
    if plot is not None:
        plot_comparison(result, plot)
        say("picture: ", (str(plot), "bold"))
    for sheet in sheets(result):
        comparison.show(sheet)
    for note in notes(result):
        say(("note: ", "yellow"), note)
    if as_json:
        print_json(result)
