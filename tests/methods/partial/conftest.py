"""A backbone on which nothing but the method is random."""

from pathlib import Path

import pytest
from support.backbones import save_backbone


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone without dropout: training and evaluation see the same function."""
    directory = tmp_path_factory.mktemp("calm") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
