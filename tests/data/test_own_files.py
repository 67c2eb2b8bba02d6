"""An own file is read once between two that need it, and again where it has changed."""

import os
from pathlib import Path

import pytest

from unipelt_cli.data import own_files
from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.own_files import OwnFiles
from unipelt_cli.data.readers import read_cells
from unipelt_cli.errors import DataError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na film,good\na book,bad\n")
    return path


def test_what_was_looked_at_is_taken_once(rows: Path) -> None:
    files = OwnFiles()
    seen = files.look_at(rows)
    assert files.take(rows) is seen
    assert files.take(rows) is not seen  # held no longer


@pytest.mark.parametrize("encoding", [None, "latin-1"])
def test_another_encoding_is_another_reading(rows: Path, encoding: str | None) -> None:
    files = OwnFiles()
    seen = files.look_at(rows, "utf-8")
    assert files.take(rows, encoding) is not seen
    assert files.take(rows, "utf-8") is seen


def labels(cells: RawColumns) -> list[str]:
    return list(cells.column("label"))


def test_a_file_that_was_written_again_is_read_again(rows: Path) -> None:
    files = OwnFiles()
    files.look_at(rows)
    before = rows.stat()
    rows.write_text("text,label\na film,fine\na book,sad\n")  # as many bytes
    assert rows.stat().st_size == before.st_size
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert labels(files.take(rows)) == ["fine", "sad"]


def test_a_file_that_changes_while_it_is_read_is_read_again(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OwnFiles()

    def changing(path: Path, encoding: str | None) -> RawColumns:
        cells = read_cells(path, encoding=encoding)
        with path.open("a") as file:
            file.write("a song,good\n")
        return cells

    monkeypatch.setattr(own_files, "read_cells", changing)
    files.look_at(rows)
    monkeypatch.setattr(own_files, "read_cells", read_cells)
    assert labels(files.take(rows)) == ["good", "bad", "good"]


def test_a_file_that_is_gone_is_an_error_for_who_takes_it(rows: Path) -> None:
    files = OwnFiles()
    files.look_at(rows)
    rows.unlink()
    with pytest.raises(DataError, match="No such file"):
        files.take(rows)
