"""A backbone on which nothing but the method is random."""

from pathlib import Path

import pytest
from support.backbones import save_backbone


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone without dropout: in training only the method draws."""
    directory = tmp_path_factory.mktemp("still") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
