"""Runs found below a directory, whatever state they are in."""

from collections.abc import Iterator
from pathlib import Path

from unipelt_cli.errors import UnipeltError
from unipelt_cli.runs.names import EXPERIMENT, FOLDS, RESULT
from unipelt_cli.runs.progress import describe_progress
from unipelt_cli.runs.run import Run, read_run


def runs_below(directory: Path) -> Iterator[tuple[Path, Run | str]]:
    """Yield each run at any depth below a directory, or what is the matter with it, by path."""
    for path in sorted(directory.glob(f"**/{EXPERIMENT}")):
        if _is_fold(path.parent):
            continue
        try:
            yield path.parent, read_run(path.parent)
        except UnipeltError:
            yield path.parent, _unfinished(path.parent)


def _is_fold(directory: Path) -> bool:
    """Say whether a directory is a part of an unfinished run."""
    return directory.parent.name == FOLDS and (directory.parents[1] / EXPERIMENT).is_file()


def _unfinished(directory: Path) -> str:
    if (directory / RESULT).is_file():
        return "damaged"
    try:
        return describe_progress(directory)
    except UnipeltError:
        return "damaged"
