"""Soft tokens stand after the first one, and leave again."""

from typing import Any

import pytest
import torch
from support.backbones import Backbones
from support.by_hand import ABSOLUTE, IDS, by_hand, hidden_of, tensors_below
from support.models import disturbed, experiment
from torch.nn import functional

from unipelt_cli.errors import BackboneError
from unipelt_cli.models.build import build


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_soft_tokens_stand_after_the_first_and_leave_again(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "prompt"), 2), 0.5)
    plain = build(experiment(backbone_dir(model_type), "head"), 2)
    embedded = plain.classifier.backbone.get_submodule("embeddings")(input_ids=IDS)
    rows = tensors_below(tuned, "prompt")["rows"]
    assert rows.shape == (10, 32)
    inserted = torch.cat([embedded[:, :1], rows[None], embedded[:, 1:]], 1)
    full = by_hand(plain, embedded=lambda _: inserted)
    expected = torch.cat([full[:, :1], full[:, 11:]], 1)
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, hidden_of(plain), atol=1e-2)


def test_soft_tokens_are_refused_where_distances_count(backbone_dir: Backbones) -> None:
    with pytest.raises(BackboneError, match="mpnet counts how far tokens are apart"):
        build(experiment(backbone_dir("mpnet"), "prompt"), 2)


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_soft_tokens_take_no_positions_from_a_row_of_full_length(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = build(experiment(backbone_dir(model_type), "prompt"), 2)
    config = tuned.classifier.backbone.config
    length = config.max_position_embeddings - tuned.pretrained.layout.position_offset
    ids = torch.full((1, length), 7)
    assert tuned.classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 2)


@pytest.mark.parametrize("start", ["vocabulary", "uniform"])
def test_soft_tokens_start_as_the_option_says(backbone_dir: Backbones, start: str) -> None:
    options = {"start": start}
    tuned = build(experiment(backbone_dir("bert"), "prompt", options=options), 2)
    rows = tensors_below(tuned, "prompt")["rows"]
    if start == "uniform":
        assert 0.4 < rows.abs().max() <= 0.5
        return
    embeddings: Any = tuned.classifier.backbone.get_submodule("embeddings")
    words = functional.layer_norm(embeddings.word_embeddings.weight, (32,), eps=1e-12)
    nearest = (rows[:, None] - words[None]).abs().amax(2).amin(1)
    assert nearest.max() < 1e-5
