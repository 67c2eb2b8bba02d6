"""Files and directories that are written whole, or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unipelt_cli.errors import RunError

TEMPORARY = ".unipelt-"  # what is being written, and what a killed process leaves
_SAVING, _NUMBER = "Error while serializing: I/O error: ", re.compile(r" \(os error \d+\).*")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: whole, on the disk, then renamed into place."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    write(path, dumps(value).encode())


def dumps(value: Mapping[str, Any]) -> str:
    """Return an object as the JSON that `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, in a new directory beside `path`; then let it take its place.

    Nobody can have put a link there, and what a killed process leaves has a name of its own.
    """
    with writing(path):
        directory = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        try:
            yield directory / path.name
            (directory / path.name).chmod(
                0o666 & ~_umask()
            )  # the tensors' library lets nobody else in
            sync(directory / path.name)
            (directory / path.name).replace(path)
            sync(path.parent)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to write in; it becomes `directory` only when all went well.

    Parents are made. Raises RunError when it exists already or cannot be written.
    """
    with writing(directory):
        refuse_existing(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=directory.parent))
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            temporary.chmod(0o777 & ~_umask())  # `mkdtemp` lets nobody else in
            temporary.rename(directory)
            sync(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(directory: Path) -> None:
    """Raise RunError for a directory to be made that is there already, whatever it is."""
    if os.path.lexists(directory):
        raise RunError(f"{directory}: exists already", "give another --out, or remove it")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into a RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _NUMBER.sub("", str(error)).removeprefix(
            _SAVING
        )
        raise RunError(
            f"{path}: cannot be written ({reason})",
            "free space or give an --out that can be written",
        ) from error


def writable(path: Path) -> Path:
    """Return the nearest directory that is there; raise RunError if `path` cannot be made in it."""
    nearest = next(ancestor for ancestor in (path, *path.absolute().parents) if ancestor.exists())
    with writing(path):
        if not nearest.is_dir():
            raise NotADirectoryError(None, "Not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(None, "Permission denied")
    return nearest


def sync(path: Path) -> None:
    """Have what was written there on the disk, so that a rename cannot overtake it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
