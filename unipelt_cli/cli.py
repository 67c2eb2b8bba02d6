"""The command line: parsing, exit codes and two-line errors; everything else is imported late."""

import os
from typing import Annotated

import typer

from unipelt_cli.commands import (
    compare,
    evaluate,
    export,
    inspect_gates,
    predict,
    push,
    recommend,
    reproduce,
    sweep,
    verify,
)
from unipelt_cli.commands.doctor.command import doctor
from unipelt_cli.commands.listing import list_
from unipelt_cli.commands.prepare import prepare
from unipelt_cli.commands.train import train
from unipelt_cli.terminal import completion
from unipelt_cli.terminal.command_group import Commands
from unipelt_cli.terminal.interrupts import INTERRUPTED, leave, obey_requests
from unipelt_cli.version import __version__

app = typer.Typer(
    name="unipelt",
    cls=Commands,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a pretrained encoder on a few labelled examples with gated submodules, "
    "and see which ones each layer used.",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Hold the options before a command."""
    if version:
        typer.echo(f"unipelt {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(prepare)
app.command()(train)
app.command("list")(list_)
app.command()(doctor)
app.command("eval")(evaluate.evaluate)
app.command()(predict.predict)
app.command("inspect-gates")(inspect_gates.inspect_gates)
app.command()(export.export)
app.command()(push.push)
app.command()(verify.verify)
app.command()(reproduce.reproduce)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(recommend.recommend)
completion.attach(app)


def main() -> None:
    """Run the command line."""
    obey_requests()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for long before they sleep take the cores that something else could
        # use: beside two busy programs an epoch took 1.8 times as long, alone 0.9 times.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app(prog_name="unipelt")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            leave()
        raise
