"""The lines of a file or a pipe, one after another: decoded, numbered, and only a few of them held.

Whatever comes, memory stays bounded: a line, what an end of line is waited for, and a run of empty
lines each have a largest size.
"""

import io
import os
import select
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from unipelt_cli.data.text_files import byte_sources
from unipelt_cli.errors import DataError
from unipelt_cli.text import reason

# What is read whole is held in memory, many times over.
LARGEST_FILE = 2**31
LONGEST_LINE = 2**24
MOST_EMPTY_LINES = 2**20
PIECE = 2**18
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
GLANCE = 2**16  # bytes of a line without end that say what it is the beginning of
OTHER_TYPES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ": in the spreadsheet, save as CSV (UTF-8)"),
    **dict.fromkeys((".parq", ".pq"), ": rename it to .parquet if it is Parquet"),
    ".gz": "; or the first three packed by gzip, as NAME.csv.gz",
    ".txt": ": rename it to .tsv if tabs part its columns, and .csv if commas do",
}
"""What to do about files of rows that are of another type."""


class Lines(Iterator[tuple[int, str]]):
    """Numbered lines, with their ends, of text that `read` gives in pieces until an empty one.

    Empty lines at the end are left out, and a BOM; what is blank as a whole has no line. A line
    of another encoding or too long raises DataError when it is its turn.
    """

    def __init__(
        self,
        origin: str,
        read: Callable[[], bytes],
        has_more: Callable[[], bool] = lambda: True,
        encoding: str | None = None,
    ) -> None:
        self.origin, self.taken = origin, 0  # characters that were handed out
        pieces = byte_sources.as_utf8(origin, read, encoding)
        self._pieces, self._has_more = pieces, has_more
        self._end_mark = b"\n"
        self._held: deque[str] = deque()
        self._blank: list[str] = []  # lines that may turn out to be the last ones
        self._begun: list[bytes] = []  # a line whose end has not come
        self._number = self._decoded = self._offset = 0
        self._failure: DataError | None = None
        self._has_ended = False

    def __next__(self) -> tuple[int, str]:
        while not self._held:
            if self._failure is not None:
                raise self._failure
            if self._has_ended:
                raise StopIteration
            self._go_on()
        line = self._held.popleft()
        number = self._number + 1
        self._number += line.endswith("\n")
        self.taken += len(line)
        return number, line

    def first(self) -> str:
        """Return the first line that is not blank, which is handed out later; "" if none is."""
        return next(iter(self.ahead(1)), "")

    def ahead(self, count: int) -> list[str]:
        """Return lines that are not blank and are handed out later: `count`, and what is there."""
        while not self._is_over() and sum(bool(line.strip()) for line in self._held) < count:
            self._go_on()
        return [line for line in islice(self._held, GLANCE) if line.strip()]

    def opening(self) -> str:
        """Return how the text begins, without waiting for the end of a long first line.

        After an opening bracket that stands alone, what follows is waited for.
        """
        while True:
            text = "".join(islice(self._held, 8)).strip()
            if not text and sum(map(len, self._begun)) > GLANCE:
                begun = b"".join(islice(self._begun, 8))[:GLANCE]
                text = begun.decode("utf-8", "ignore").strip("\ufeff \t\r\n")
            if text not in ("", "[", "{") or self._is_over():
                return text
            self._go_on()

    def cut_at(self, mark: bytes) -> None:
        """Hand out lines in parts that end with an ASCII mark: then they may be of any length."""
        self._end_mark = mark

    def _is_over(self) -> bool:
        return self._failure is not None or self._has_ended

    def is_ready(self) -> bool:
        """Say whether the next line, or the end, can be had without waiting for somebody."""
        while not self._held and not self._is_over():
            if not self._has_more():
                return False
            self._go_on()
        return True

    def _go_on(self) -> None:
        """Read one more piece, and take up the lines that end in it."""
        try:
            piece = next(self._pieces, b"")
        except OSError as error:
            what = f"{self.origin}: {reason(error)}"
            raise DataError(what, "give text, in a file or through a pipe") from error
        except byte_sources.NotInEncoding as error:
            hint = f"give the right --encoding, for example {', '.join(byte_sources.USUAL[:3])}"
            self._fail(self._decoded + 1, str(error), hint)
            return
        cut = piece.rfind(self._end_mark) + 1
        if piece and not cut:
            self._begun.append(piece)
            if sum(map(len, self._begun)) > LONGEST_LINE:
                self._fail(self._decoded + 1, f"longer than {LONGEST_LINE} bytes", "cut it")
            return
        whole = b"".join([*self._begun, piece[:cut]])
        self._begun = [piece[cut:]]
        self._take(whole)
        if not piece:
            self._end()

    def _take(self, content: bytes) -> None:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            text = content[: content.rfind(b"\n", 0, error.start) + 1].decode("utf-8")
            byte, position = content[error.start], self._offset + error.start
            what = f"not UTF-8 (byte 0x{byte:02x} at offset {position})"
            # As older spreadsheets write.
            hint = "save it as UTF-8, for example: iconv -f windows-1252 -t utf-8 FILE > NEW; "
            hint += "or give --encoding windows-1252"
            self._fail(self._decoded + text.count("\n") + 1, what, hint)
        if not self._offset:
            text = text.removeprefix("\ufeff")
        self._offset += len(content)
        for line in io.StringIO(text, newline="\n"):
            self._decoded += line.endswith("\n")
            if line.strip():
                self._held.extend([*self._blank, line])
                self._blank.clear()
            else:
                self._blank.append(line)
        if len(self._blank) > MOST_EMPTY_LINES:
            self._fail(self._decoded, f"more than {MOST_EMPTY_LINES} lines are empty", "cut them")

    def _end(self) -> None:
        """Hand out the blank lines at the end, if they hold anything and something is before."""
        self._has_ended = True
        while self._blank and not self._blank[-1].strip("\r\n"):
            self._blank.pop()
        if self._number or self._held:
            self._held.extend(self._blank)

    def _fail(self, line: int, what: str, hint: str) -> None:
        self._failure = self._failure or DataError(f"{self.origin}, line {line}: {what}", hint)


def of_bytes(origin: str, content: bytes, encoding: str | None = None) -> Lines:
    """Return the lines of what was read already; raise DataError where they are too many."""
    stream = io.BytesIO(content)
    return Lines(origin, lambda: stream.read(PIECE), encoding=encoding)


@contextmanager
def of_file(path: Path, encoding: str | None = None) -> Iterator[Lines]:
    """Give the lines of a regular file, as far as it goes now; raise DataError for another."""
    with _naming_errors(path):
        left = _size(path)
        stream = path.open("rb")

    def read() -> bytes:
        nonlocal left
        piece = stream.read(min(PIECE, left))
        left -= len(piece)
        return piece

    with stream:
        yield Lines(str(path), read, encoding=encoding)


def of_pipe(origin: str, stream: BinaryIO, encoding: str | None = None) -> Lines:
    """Return the lines of a pipe or a terminal, each as soon as it is there."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no pipe: it holds what it has in memory
        return Lines(origin, lambda: stream.read(PIECE), encoding=encoding)

    def has_more() -> bool:
        return bool(select.select([number], [], [], 0)[0])

    return Lines(origin, lambda: os.read(number, PIECE), has_more, encoding)


def read_bytes(path: Path, suffixes: Sequence[str]) -> bytes:
    """Read a regular file of one of these types; raise DataError for what is none, or too large.

    What is no file, such as a pipe that nobody writes to or an endless device, is not opened.
    """
    with _naming_errors(path):
        check_suffix(path, suffixes)
        size = _size(path)
        if size > LARGEST_FILE:
            what = f"{size} bytes, more than {LARGEST_FILE}"
            raise DataError(f"{path}: {what}", "split it into smaller files")
        with path.open("rb") as file:
            return file.read(size)


def suffix_of(path: Path) -> str:
    """Return what a file's name says that it holds: of a text that gzip packed, what is in it."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in (".csv", ".tsv", *JSON_SUFFIXES) else suffix


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise DataError for a file whose name ends in none of these; a folder is told as such."""
    usable = (*suffixes, *JSON_SUFFIXES) if ".jsonl" in suffixes else suffixes
    with _naming_errors(path):
        if suffix_of(path) not in usable and not stat.S_ISDIR(path.stat().st_mode):
            what = f"unknown file type {path.suffix!r}"
            hint = f"give {', '.join(suffixes)}"
            if ".csv" in suffixes:
                hint += OTHER_TYPES.get(path.suffix.lower(), "")
            raise DataError(f"{path}: {what}", hint)


def _size(path: Path) -> int:
    """Return a regular file's size in bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DataError(f"{path}: {what}", "give the path of a file")
    return status.st_size


@contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Say of which file the system's error is."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: {reason(error)}", "check the path and its rights") from error
