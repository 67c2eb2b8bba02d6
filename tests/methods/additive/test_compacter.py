"""Compacter's bottleneck is a sum of Kronecker products."""

import numpy as np
import pytest
import torch
from support.backbones import Backbones
from support.models import disturbed, logits_of, seen_by, tuned_of
from support.rows import SENTENCES
from torch import Tensor
from torch.nn import functional

from unipelt_cli.methods.additive import compacter

SIXTEEN = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(16)]
LABELS = np.array([0, 1] * 8)


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the dense (in, out) matrix of sum_i A_i kron (s_i t_i^T), number by number."""
    inputs, outputs = left.shape[1], right.shape[2]
    dense = torch.zeros(rule.shape[1] * inputs, rule.shape[2] * outputs)
    for a, s, t in zip(rule, left, right, strict=True):
        for row in range(len(dense)):
            for column in range(dense.shape[1]):
                factor = a[row // inputs, column // outputs]
                dense[row, column] += factor * (s[row % inputs] @ t[:, column % outputs])
    return dense


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [
        ("compacter", {}, "attention.output"),
        ("compacter", {"rank": 2, "products": 2}, "output"),
        ("compacter-plus-plus", {}, "output"),
    ],
)
def test_compacter_adds_a_bottleneck_of_kronecker_sums_before_the_residual(
    backbone_dir: Backbones, name: str, options: dict[str, object], place: str
) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), name, options=options), 0.3)
    own = dict(tuned.classifier.backbone.named_parameters())
    rule = own["shared_parameters.compacter.phm_rule"]
    layer = tuned.classifier.backbone.encoder.layer[1]
    block = layer.get_submodule(place)
    (states, residual), output = seen_by(block, lambda: logits_of(tuned, SENTENCES))

    def dense(unit: str, x: Tensor) -> Tensor:
        prefix = f"encoder.layer.1.{place}.adapters.compacter.{unit}."
        matrix = kronecker(rule, own[f"{prefix}W_left"], own[f"{prefix}W_right"])
        return x @ matrix + own[f"{prefix}b"]

    with torch.no_grad():
        z = functional.linear(states, block.dense.weight, block.dense.bias)
        added = dense("adapter_up", functional.gelu(dense("adapter_down.0", z)))
        expected = block.LayerNorm(residual + z + added)
    assert added.abs().max() > 0.01
    assert torch.allclose(output, expected, atol=1e-5)


def test_compacter_has_one_set_of_rules_for_all_layers(backbone_dir: Backbones) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), "compacter"))
    backbone = tuned.classifier.backbone
    assert [n for n in tuned.stored() if n.endswith("phm_rule")] == [
        "backbone.shared_parameters.compacter.phm_rule"
    ]
    units = [m for n, m in backbone.named_modules() if n.endswith(("adapter_down.0", "adapter_up"))]
    assert len(units) == 8
    with torch.no_grad():
        backbone.shared_parameters["compacter"]["phm_rule"].zero_()
    for unit in units:  # with the rules at zero, every unit everywhere gives its bias alone
        _, output = seen_by(unit, lambda: logits_of(tuned, SENTENCES))
        assert torch.equal(output, unit.b.expand_as(output))


def test_factors_start_glorot_uniform_with_the_authors_gain(backbone_dir: Backbones) -> None:
    options = {"reduction": 2, "rank": 2}
    own = dict(tuned_of(backbone_dir("bert"), "compacter", options=options).stored())
    for end, factor in (("W_left", (8, 2)), ("W_right", (2, 4))):
        drawn = [t for name, t in own.items() if name.endswith(f"adapter_down.0.{end}")]
        assert [tuple(t.shape[1:]) for t in drawn] == [factor] * 4
        numbers = torch.cat([t.flatten() for t in drawn])
        bound = 2**0.5 * (6 / sum(factor)) ** 0.5
        assert 0.95 * bound < numbers.abs().max().item() <= bound
        assert numbers.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("hidden", [32, 128, 256, 312, 384, 768, 1024])
def test_compacters_bottleneck_is_a_multiple_that_the_library_takes_over(hidden: int) -> None:
    width = compacter.Compacter().width(hidden)
    assert width % 4 == 0
    assert width - 4 < hidden / 32 <= width or width == hidden // 32
    assert int(hidden // (hidden / (width + 0.5))) == width
