"""The code of a model card, run as a reader runs it."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def snippet(folder: Path, rows: list[str] | list[tuple[str, str]]) -> Iterator[str]:
    """Yield the card's code, word for word but for its example rows."""
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = code[1].splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("folder, rows ="))
    assert lines[place].startswith(f"folder, rows = {folder.name!r}, ")
    lines[place] = f"folder, rows = {folder.name!r}, {rows!r}"
    yield from lines


def run_snippet(folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    code = "\n".join(snippet(folder, rows))
    assert not {"torch", "transformers", "unipelt"} & set(re.findall(r"\w+", code))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, names)
    return names | {"said": said.getvalue().strip()}
