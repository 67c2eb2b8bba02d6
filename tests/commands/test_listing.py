"""The command `list`."""

import json

import pytest
from support.command import invoke


@pytest.mark.parametrize("what", ["tasks", "methods", "presets", "backbones"])
def test_lists(what: str) -> None:
    code, stdout, stderr = invoke("list", what)
    assert (code, stdout) == (0, "")
    code, stdout, _ = invoke("list", what, "--json")
    entries = json.loads(stdout)[what]
    assert len(entries) >= 6
    assert all(str(next(iter(entry.values()))) in stderr for entry in entries)
    assert max(map(len, stderr.splitlines())) <= 80
