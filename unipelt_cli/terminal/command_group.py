"""How a command ends: exit codes, two-line errors, a closed pipe."""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from unipelt_cli.errors import UnipeltError, nearest
from unipelt_cli.system.imports import is_importing
from unipelt_cli.terminal import completion, console, tables, usage_hints

INTERRUPTED = 130
USAGE = 2
MISSING = {
    "run": "give a run's directory; `unipelt list runs` shows those below runs/",
    "file": "give a file with the run's text columns, or - to read lines from stdin",
    "what": f"give one of {', '.join(completion.LISTS)}",
    "directories": "give runs, or directories that hold some, for example runs/",
}
_was_asked = False
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
        debug = "--debug" in (sys.argv[1:] if args is None else args)
        try:
            try:
                given = (args, prog_name, complete_var, False, windows_expand_args)
                code = super().main(*given, **extra)
                _flush()
            except BaseException:
                if was_asked():  # within an import, libraries make other errors of it
                    raise KeyboardInterrupt from None
                raise
        except UsageError as error:
            code = _fail(*_usage(error, sys.argv[1:] if args is None else args), USAGE)
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
            console.discard(sys.stdout)  # half an answer would look whole
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
            console.discard(sys.stdout)
            return 0


def print_json(value: dict[str, Any]) -> None:
    """Write a command's answer to stdout."""
    typer.echo(json.dumps(value, indent=2))


def _flush() -> None:
    """Write out what the answer's buffer holds, while a failure can still be told."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        console.discard(sys.stdout)


def _system(error: OSError) -> tuple[str, str]:
    """Turn an error of the system into what is wrong and what to do."""
    reason = error.strerror or type(error).__name__
    if error.filename is not None:
        return f"{error.filename}: {reason}", "check the path and its rights"
    console.discard(sys.stdout)  # most likely what failed: it must not fail again at the end
    return f"the output cannot be written: {reason}", "check the disk, and where the output goes"


def obey_requests() -> None:
    """Treat a request to end, and Ctrl-C, as one thing from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, _interrupt)


def was_asked() -> bool:
    """Say whether a request to end has come, whatever became of its KeyboardInterrupt."""
    return _was_asked


def _interrupt(number: int, frame: object) -> None:
    global _was_asked  # as the signal's own disposition is the process's
    if is_importing():  # nothing is written yet, and libraries end in odd ways
        os._exit(INTERRUPTED)
    _was_asked = True
    raise KeyboardInterrupt


def leave() -> None:
    """End an interrupted process; what it had to say has been said.

    Python itself would end by a signal where code inside a library was interrupted.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _fail(message: str, hint: str, code: int) -> int:
    tables.error(message, hint)
    return code


def _usage(error: Any, given: Sequence[str]) -> tuple[str, str]:
    """Turn a parser's error into what is wrong and what to do."""
    message = " ".join(error.format_message().split())
    message = re.sub(r"\s*\(?Did you mean.*|\s*\(Possible options:.*", "", message).rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "unipelt"
    see = f"see `{path} --help`"
    if error.ctx is None:
        return message, see
    options = [o for p in error.ctx.command.params for o in p.opts if o.startswith("--")]
    name = getattr(error, "option_name", None)
    if name is not None:
        close = nearest(name, options).partition(" otherwise")[0]
        known = usage_hints.option(name, given, options)
        return message, known or (f"{close} {see}" if "?" in close else see)
    if unknown := re.match(r"No such command '(.*)'", message):
        return message, usage_hints.command(unknown[1], list(error.ctx.command.commands))
    if extra := re.match(r"Got unexpected extra argument\S* \(([^\s)]+)", message):
        known = usage_hints.argument(extra[1], given, options)
        return message.replace("(s)", ""), known or see
    if wrong := re.match(r"Invalid value for '(--\S+)'.*valid integer", message):
        value = usage_hints.value_of(wrong[1], given) or ""
        return f"{wrong[1]} {value!r}: not a whole number", usage_hints.number(wrong[1], value)
    missing = getattr(error, "param", None)
    if message.startswith("Missing") and missing is not None and missing.name in MISSING:
        return message, MISSING[missing.name]
    return message[0].upper() + message[1:], see
