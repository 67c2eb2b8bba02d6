"""Own files on their way from the guess of their columns to the draw of their rows: read once."""

from pathlib import Path

from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.readers import read_cells

Stamp = tuple[int, int, int, int, int]
"""Device, place on it, bytes, and when content and state were changed, in nanoseconds."""


class OwnFiles:
    """Files that were looked at, and whose rows nobody has taken yet: they are held until then."""

    def __init__(self) -> None:
        self._held: dict[tuple[Path, str | None], tuple[Stamp | None, RawColumns]] = {}

    def look_at(self, path: Path, encoding: str | None = None) -> RawColumns:
        """Read a whole file, and hold it for who takes it; raise what `read_cells` does."""
        stamp = _stamp(path)  # before it is read: what is written meanwhile shows
        cells = read_cells(path, encoding=encoding)
        self._held[path, encoding] = stamp, cells
        return cells

    def take(self, path: Path, encoding: str | None = None) -> RawColumns:
        """Return a whole file and hold it no longer; it is read if it is not held, or changed."""
        stamp, cells = self._held.pop((path, encoding), (None, None))
        if cells is not None and stamp is not None and stamp == _stamp(path):
            return cells
        return read_cells(path, encoding=encoding)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None  # said by who reads it
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
