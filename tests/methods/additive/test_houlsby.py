"""Houlsby's pair of adapters against the paper's formula."""

import pytest
import torch
from support.backbones import Backbones
from support.by_hand import IDS, PLAIN, bottleneck, by_hand, hidden_of, tensors_below
from support.models import disturbed, experiment
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.models.build import build


@pytest.mark.parametrize("model_type", PLAIN)
def test_houlsby_adapts_what_each_block_adds_to_the_residual(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(build(experiment(backbone_dir(model_type), "houlsby"), 2))
    expected = by_hand(
        tuned,
        attention=lambda i: (
            lambda a: (
                a
                + bottleneck(tensors_below(tuned, f"bottlenecks.{i}.attention"), functional.gelu)(a)
            )
        ),
        output=lambda i: (
            lambda _, z: (
                z + bottleneck(tensors_below(tuned, f"bottlenecks.{i}.output"), functional.gelu)(z)
            )
        ),
    )
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(tuned), atol=1e-2)


def test_houlsby_starts_near_the_backbone_and_trains_every_norm(backbone_dir: Backbones) -> None:
    tuned = build(experiment(backbone_dir("bert"), "houlsby"), 2)
    plain = build(experiment(backbone_dir("bert"), "head"), 2)
    assert 0 < (hidden_of(tuned) - hidden_of(plain)).abs().max() < 1e-4
    drawn = [m for m in tensors_below(tuned, "bottlenecks").values() if m.ndim == 2]
    assert all(matrix.abs().max() <= 2e-3 for matrix in drawn)
    norms = {name for name, m in tuned.classifier.named_modules() if isinstance(m, nn.LayerNorm)}
    own = {
        name.rpartition(".")[0]
        for name, parameter in tuned.classifier.named_parameters()
        if parameter.requires_grad and "bottlenecks" not in name and "head" not in name
    }
    assert own == norms


@pytest.mark.parametrize(("model_type", "place"), [("bert", "attention"), ("distilbert", "output")])
def test_houlsby_reads_after_the_dropout(
    backbone_dir: Backbones, model_type: str, place: str
) -> None:
    tuned = build(experiment(backbone_dir(model_type), "houlsby"), 2)
    adapter = tuned.classifier.backbone.get_submodule(f"bottlenecks.1.{place}")
    seen: list[Tensor] = []
    adapter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tuned.classifier.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned.classifier(input_ids=IDS.expand(8, -1), attention_mask=torch.ones(8, IDS.shape[1]))
    assert 0.07 < (seen[0] == 0).float().mean() < 0.13
