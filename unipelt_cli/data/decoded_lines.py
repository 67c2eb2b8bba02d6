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
from pathlib import Path
from typing import BinaryIO

from unipelt_cli.errors import DataError
from unipelt_cli.text import reason

# What is read whole is held in memory, many times over.
LARGEST_FILE = 2**31
LONGEST_LINE = 2**24
MOST_EMPTY_LINES = 2**20
PIECE = 2**18
# By a byte-order mark, or taken for the encoding of older spreadsheets.
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
OTHER_TYPES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ": in the spreadsheet, save as CSV (UTF-8)"),
    ".json": "; JSON lines have one object a line: jq -c '.[]' FILE.json > FILE.jsonl",
    ".txt": ": rename it to .tsv if tabs part its columns, and .csv if commas do",
}
"""What to do about files of rows that are of another type."""


class Lines(Iterator[tuple[int, str]]):
    """Numbered lines, with their ends, of text that `read` gives in pieces until an empty one.

    Empty lines at the end are left out, and a BOM; what is blank as a whole has no line. A line
    that is not UTF-8 or too long raises DataError when it is its turn.
    """

    def __init__(
        self, origin: str, read: Callable[[], bytes], has_more: Callable[[], bool] = lambda: True
    ) -> None:
        self.origin, self.taken = origin, 0  # characters that were handed out
        self._read, self._has_more = read, has_more
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
        self._number += 1
        self.taken += len(line)
        return self._number, line

    def first(self) -> str:
        """Return the first line that is not blank, which is handed out later; "" if none is."""
        while not self._held and self._failure is None and not self._has_ended:
            self._go_on()
        return next((line for line in self._held if line.strip()), "")

    def is_ready(self) -> bool:
        """Say whether the next line, or the end, can be had without waiting for somebody."""
        while not self._held and self._failure is None and not self._has_ended:
            if not self._has_more():
                return False
            self._go_on()
        return True

    def _go_on(self) -> None:
        """Read one more piece, and take up the lines that end in it."""
        try:
            piece = self._read()
        except OSError as error:
            what = f"{self.origin}: {reason(error)}"
            raise DataError(what, "give text, in a file or through a pipe") from error
        cut = piece.rfind(b"\n") + 1
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
            byte, place = content[error.start], self._offset + error.start
            what = f"not UTF-8 (byte 0x{byte:02x} at offset {place})"
            encoding = ENCODINGS.get(content[:2], "windows-1252")
            hint = f"save it as UTF-8, for example: iconv -f {encoding} -t utf-8 FILE > NEW"
            self._fail(self._decoded + text.count("\n") + 1, what, hint)
        if not self._offset:
            text = text.removeprefix("\ufeff")
        self._offset += len(content)
        for line in io.StringIO(text, newline="\n"):
            self._decoded += 1
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


def of_bytes(origin: str, content: bytes) -> Lines:
    """Return the lines of what was read already."""
    stream = io.BytesIO(content)
    return Lines(origin, lambda: stream.read(PIECE))


@contextmanager
def of_file(path: Path) -> Iterator[Lines]:
    """Give the lines of a regular file, as far as it goes now; raise DataError for another."""
    with _told(path):
        left = _size(path)
        stream = path.open("rb")

    def read() -> bytes:
        nonlocal left
        piece = stream.read(min(PIECE, left))
        left -= len(piece)
        return piece

    with stream:
        yield Lines(str(path), read)


def of_pipe(origin: str, stream: BinaryIO) -> Lines:
    """Return the lines of a pipe or a terminal, each as soon as it is there."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no pipe: it holds what it has in memory
        return Lines(origin, lambda: stream.read(PIECE))
    return Lines(
        origin, lambda: os.read(number, PIECE), lambda: bool(select.select([number], [], [], 0)[0])
    )


def read_bytes(path: Path, suffixes: Sequence[str]) -> bytes:
    """Read a regular file of one of these types; raise DataError for what is none, or too large.

    What is no file, such as a pipe that nobody writes to or an endless device, is not opened.
    """
    with _told(path):
        check_suffix(path, suffixes)
        size = _size(path)
        if size > LARGEST_FILE:
            what = f"{size} bytes, more than {LARGEST_FILE}"
            raise DataError(f"{path}: {what}", "split it into smaller files")
        with path.open("rb") as file:
            return file.read(size)


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise DataError for a file whose name ends in none of these; a folder is told as such."""
    with _told(path):
        if path.suffix.lower() not in suffixes and not stat.S_ISDIR(path.stat().st_mode):
            what = f"unknown file type {path.suffix!r}"
            hint = f"give {', '.join(suffixes)}"
            if ".csv" in suffixes:
                hint += OTHER_TYPES.get(path.suffix.lower(), "")
            raise DataError(f"{path}: {what}", hint)


def _size(path: Path) -> int:
    """Return a regular file's size in bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise DataError(f"{path}: {what}", "give the path of a file")
    return found.st_size


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of which file the system's error is."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: {reason(error)}", "check the path and its rights") from error
