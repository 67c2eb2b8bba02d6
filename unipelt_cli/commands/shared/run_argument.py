"""Where a run is that a command was given: a directory, or on the hub."""

from collections.abc import Sequence
from pathlib import Path

from unipelt_cli.commands.shared.settings import flag_text
from unipelt_cli.errors import ConfigError
from unipelt_cli.runs import hub
from unipelt_cli.terminal import console


def locate(run: Path, offline: bool) -> Path:
    """Return the directory of a run; one on the hub is fetched, and its commit said."""
    directory = hub.directory_of(run, offline=offline)
    if hub.is_remote(run):
        console.say(f"{run}: commit {directory.name[:12]}")
    return directory


def file_columns(columns: Sequence[str], text: str | None, text_pair: str | None) -> dict[str, str]:
    """Return what a file calls each text column of a run: its own name, or what was given.

    Raises ConfigError where `--text` and `--text-pair` are more or fewer than the run reads.
    """
    names = [name for name in (text, text_pair) if name is not None]
    if not names:
        return {column: column for column in columns}
    if text is None or len(names) != len(columns):
        flags = flag_text("--text", text), flag_text("--text-pair", text_pair)
        reads = " and ".join(map(repr, columns))
        needed = ("--text COLUMN", "--text COLUMN --text-pair COLUMN")[min(len(columns), 2) - 1]
        raise ConfigError(
            f"{' '.join(filter(None, flags))}: the run reads {reads}",
            f"give {needed}"
            if len(columns) < 3
            else "name the columns in the file as the run does",
        )
    return dict(zip(columns, names, strict=True))


def default_output(run: Path, what: str) -> Path:
    """Return where what is made of a run goes, if nobody says so: beside it, or here."""
    if hub.is_remote(run):
        return Path(f"{hub.parse(str(run))[0].partition('/')[2]}-{what}")
    named = run if run.name not in ("", "..") else run.resolve()
    return named.with_name(f"{named.name}-{what}")
