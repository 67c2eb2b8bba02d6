"""The adapters library, one thread, and few rows to compare on."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from unipelt_cli.exports import job


@pytest.fixture(scope="module")
def adapters() -> Iterator[Any]:
    """The library of that name; it warns where this project's tests allow no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import adapters

        yield adapters


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Rows of a few tokens, one by one: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a few rows where many exports are made: all rows take most of their time."""
    monkeypatch.setattr(job, "ROWS", 8)
