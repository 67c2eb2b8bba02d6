"""How a command ends: exit codes, two-line errors, a closed pipe."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from unipelt_cli.errors import UnipeltError
from unipelt_cli.files.as_json import as_json
from unipelt_cli.terminal import console
from unipelt_cli.terminal.interrupts import INTERRUPTED, was_asked
from unipelt_cli.terminal.usage_hints import explain_usage_error

USAGE = 2
# Typer carries its own Click, whose classes it does not export one by one.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The commands; every error of theirs is shown here, so that tests see what users see."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code."""
        given = sys.argv[1:] if args is None else args
        debug = "--debug" in given
        try:
            try:
                positional = (args, prog_name, complete_var, False, windows_expand_args)
                with console.stdout_left_to_json("--json" in given):
                    code = super().main(*positional, **extra)
                _flush()
            except BaseException:
                if was_asked():  # within an import, libraries make other errors of it
                    raise KeyboardInterrupt from None
                raise
        except UsageError as error:
            code = _fail(*explain_usage_error(error, given), USAGE)
        except UnipeltError as error:
            if debug:
                raise
            code = _fail(error.message, error.hint, error.exit_code)
        except OSError as error:
            if debug or error.errno is None:
                raise
            code = _fail(*_system(error), USAGE)
        except SystemExit as ended:  # the parser's own way out of a pipe that was closed
            code = 0 if isinstance(ended.__context__, BrokenPipeError) else ended.code
        except (KeyboardInterrupt, typer.Abort):
            console.discard_stream(sys.stdout)  # half an answer would look whole
            code = INTERRUPTED
        code = code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a reader that closes the pipe has what it wanted."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            console.discard_stream(sys.stdout)
            return 0


def print_json(value: object) -> None:
    """Write a command's answer to stdout."""
    typer.echo(json.dumps(as_json(value), indent=2))


def _flush() -> None:
    """Write out what the answer's buffer holds, while a failure can still be told."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        console.discard_stream(sys.stdout)


def _system(error: OSError) -> tuple[str, str]:
    """Turn an error of the system into what is wrong and what to do."""
    reason = error.strerror or type(error).__name__
    if error.filename is not None:
        return f"{error.filename}: {reason}", "check the path and its rights"
    console.discard_stream(sys.stdout)  # most likely what failed: it must not fail again at the end
    return f"the output cannot be written: {reason}", "check the disk, and where the output goes"


def _fail(message: str, hint: str, code: int) -> int:
    console.error(message, hint)
    return code
