"""IA3 scales keys, values and the inner states."""

from collections.abc import Callable

import pytest
import torch
from support.backbones import Backbones
from support.by_hand import PLAIN, Change, by_hand, hidden_of, tensors_below
from support.models import disturbed, experiment, logits_of
from support.rows import SENTENCES

from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import merge


@pytest.mark.parametrize("model_type", PLAIN)
def test_ia3_scales_after_the_projection_and_after_the_non_linearity(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "ia3"), 2), 0.5)

    def scale(name: str) -> Callable[[int], Change]:
        return lambda index: lambda x: x * tensors_below(tuned, f"scales.layers.{index}")[name]

    expected = by_hand(tuned, key=scale("key"), value=scale("value"), inner=scale("inner"))
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(tuned), atol=1e-2)


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ia3_starts_as_the_backbone_to_the_bit(
    backbone_dir: Backbones, model_type: str, precision: str
) -> None:
    train = {"precision": precision}
    tuned = build(experiment(backbone_dir(model_type), "ia3", train=train), 2)
    plain = build(experiment(backbone_dir(model_type), "head", train=train), 2)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))


@pytest.mark.parametrize("model_type", PLAIN)
def test_ia3_merges_into_the_weights(backbone_dir: Backbones, model_type: str) -> None:
    settings = experiment(backbone_dir(model_type), "ia3", model={"pooling": "native"})
    tuned = disturbed(build(settings, 2), 0.5)
    before = logits_of(tuned, SENTENCES)
    merge(tuned)
    assert not hasattr(tuned.classifier.backbone, "scales")
    assert torch.allclose(logits_of(tuned, SENTENCES), before, atol=1e-5)
