"""The command line as tests call it, and its two-line errors."""

from pathlib import Path

from typer.testing import CliRunner

from unipelt_cli.cli import app

FAST = [
    *("--set", "train.epochs=3", "--set", "train.batch_size=8"),
    *("--device", "cpu", "--precision", "fp32"),
]


def invoke(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="unipelt", input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def error_of(*arguments: object) -> tuple[str, str]:
    """Run a command that must fail with exit code 2 and two lines; return the two sentences."""
    code, stdout, stderr = invoke(*arguments)
    lines = stderr.splitlines()
    assert (code, stdout, len(lines)) == (2, "", 2), stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def rows_options(rows: Path) -> list[str]:
    """Return options for own rows that are cut into train, dev and test, however few they are."""
    return ["--train-file", str(rows), "--text", "text", "--label", "label", "--folds", "none"]
