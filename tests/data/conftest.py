"""Rows come from where the test says, whatever the environment names."""

import pytest


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("UNIPELT_DATA", raising=False)
