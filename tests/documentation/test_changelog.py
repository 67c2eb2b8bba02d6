"""The changelog begins with the version that the package has."""

import re
from pathlib import Path

import unipelt_cli

ROOT = Path(__file__).parents[2]


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == unipelt_cli.__version__
