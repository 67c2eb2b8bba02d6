"""LoReFT edits states within a subspace."""

import pytest
import torch
from support.backbones import Backbones
from support.models import disturbed, logits_of, seen_by, train_on_sixteen, tuned_of
from support.rows import SENTENCES
from torch.nn import functional

from unipelt_cli.models.evaluation import encode_rows


@pytest.mark.parametrize("first", [None, 2])
def test_loreft_edits_states_within_its_subspace_and_never_padding(
    backbone_dir: Backbones, first: int | None
) -> None:
    options = {"rank": 3, **({} if first is None else {"first_tokens": first})}
    tuned = disturbed(tuned_of(backbone_dir("bert"), "loreft", options=options))
    train_on_sixteen(tuned, epochs=1, learning_rate=1e-2)
    rows = tuned.stored()["backbone.edits.layers.1.rows"]
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    norm = tuned.classifier.backbone.encoder.layer[1].output.LayerNorm
    target = tuned.classifier.backbone.edits.layers[1].target
    (summed,), output = seen_by(norm, lambda: logits_of(tuned, SENTENCES[2:], pad_to=9))
    before = functional.layer_norm(summed, (32,), norm.weight, norm.bias, norm.eps)
    rows_of = encode_rows(tuned, [SENTENCES[2:]], 128)
    edited = 0
    for row, length in enumerate(rows_of.lengths):
        for place in range(9):
            h = before[row, place]
            if place < min(length, first or 99):
                edited += 1
                wanted = target.weight @ h + target.bias - rows @ h
                assert torch.allclose(output[row, place], h + rows.T @ wanted, atol=1e-5)
                assert not torch.allclose(output[row, place], h, atol=1e-3)
            else:
                assert torch.equal(output[row, place], h)
    assert edited == (sum(rows_of.lengths) if first is None else 4)
