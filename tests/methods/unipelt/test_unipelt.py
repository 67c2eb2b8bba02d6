"""Unions of submodules: their parts, rates and gates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.backbones import Backbones
from support.by_hand import PLAIN, bottleneck, by_hand, hidden_of, tensors_below
from support.models import disturbed, experiment, logits_of, loop_on_sixteen, seen_by
from support.rows import SENTENCES
from torch import Tensor, nn

from unipelt_cli import methods
from unipelt_cli.errors import ConfigError
from unipelt_cli.methods.building_blocks import Prefix
from unipelt_cli.methods.unipelt.inspection import record_gates
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.build import build


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("gated", [False, True])
def test_the_parallel_adapter_reads_what_the_feed_forward_block_reads(
    backbone_dir: Backbones, model_type: str, gated: bool
) -> None:
    options = {"gated": gated, "parallel_scale": 3.0}
    settings = experiment(backbone_dir(model_type), "parallel-adapter", options=options)
    tuned = build(settings, 2)
    plain = build(experiment(backbone_dir(model_type), "head"), 2)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))
    disturbed(tuned)

    def output(index: int) -> Callable[[Tensor, Tensor], Tensor]:
        own = tensors_below(tuned, f"submodules.layers.{index}")
        adapter = {n.removeprefix("parallel."): t for n, t in own.items() if "parallel." in n}

        def change(h1: Tensor, z: Tensor) -> Tensor:
            added = 3 * bottleneck(adapter, torch.relu)(h1)
            if gated:
                opened = h1 @ own["gates.parallel.weight"].T + own["gates.parallel.bias"]
                added = added * opened.sigmoid().mean(1, keepdim=True)
            return z + added

        return change

    expected = by_hand(tuned, output=output)
    assert torch.allclose(hidden_of(tuned), expected, atol=1e-5)
    assert not torch.allclose(expected, hidden_of(plain), atol=1e-2)


def test_a_free_union_has_the_gates_of_its_parts(backbone_dir: Backbones) -> None:
    options = {"parts": "lora,parallel,adapter,bias"}
    tuned = build(experiment(backbone_dir("bert"), "union", options=options), 2)
    with record_gates(tuned.classifier.backbone) as recorded:
        logits_of(tuned, SENTENCES)
    assert [set(layer) for layer in recorded] == [{"lora", "parallel", "adapter", "bias"}] * 2
    assert all(values.shape == (4,) for layer in recorded for values in layer.values())
    without = experiment(backbone_dir("bert"), "union", options=options | {"gated": False})
    with record_gates(build(without, 2).classifier.backbone) as recorded:
        assert not recorded


def test_every_part_may_have_a_rate_of_its_own(backbone_dir: Backbones) -> None:
    factors = {"adapter": 0.2, "prefix": 0.4, "lora": 3.0, "bias": 5.0, "parallel": 7.0}
    options: dict[str, Any] = {f"{name}_rate": f for name, f in factors.items()}
    options |= {"parts": ",".join(factors), "gate_rate": 9.0}
    tuned = build(experiment(backbone_dir("bert"), "union", options=options), 2)
    optimizer = loop_on_sixteen(tuned, epochs=1).stepper.optimizer
    names = {id(p): name for name, p in tuned.classifier.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("backbone.submodules.")
            kind = next((k for k in ("head", "gates", *factors) if f".{k}." in f".{name}"), name)
            found.setdefault(kind, set()).add(group["factor"])
    expected = {"head": {1.0}, "gates": {9.0}, **{k: {f} for k, f in factors.items()}}
    assert found == expected


def test_gates_start_where_their_bias_says(backbone_dir: Backbones) -> None:
    opened = []
    for bias in (-30.0, 0.0, 30.0):
        settings = experiment(backbone_dir("bert"), "union", options={"gate_bias": bias})
        tuned = build(settings, 2)
        with record_gates(tuned.classifier.backbone) as recorded:
            logits_of(tuned, SENTENCES)
        opened.append(torch.stack([torch.stack([*layer.values()]) for layer in recorded]))
    assert opened[0].max() < 1e-6
    assert 0.3 < opened[1].min() < opened[1].max() < 0.7
    assert opened[2].min() > 1 - 1e-6
    with pytest.raises(ConfigError, match=r"gate_bias = 1.0: there is no gate"):
        experiment(Path("minilm"), "union", options={"gated": False, "gate_bias": 1.0})


def test_mam_is_the_glue_recipe() -> None:
    recipe = methods.get("mam").method
    assert isinstance(recipe, Submodules)
    assert (recipe.prefix_length, recipe.parallel_bottleneck, recipe.parallel_scale) == (16, 16, 2)
    assert recipe.parts == ("prefix", "parallel")
    assert recipe.parallel_dropout == 0.1
    assert not recipe.gated


@pytest.mark.parametrize(
    ("start", "width", "std", "expected"),
    [("normal", 512, 0.02, 0.0051), ("uniform", 800, 1.0, 0.263)],
)
def test_a_prefix_starts_as_wide_as_its_authors_code_makes_it(
    start: Literal["normal", "uniform"], width: int, std: float, expected: float
) -> None:
    """Measured in the releases: UniPELT's 0.0051, He et al.'s 0.263."""
    generator = torch.Generator().manual_seed(3)
    prefix = Prefix((12, 16, 768), width, generator, False, std, start).requires_grad_(False)
    assert float(prefix().std()) == pytest.approx(expected, rel=0.1)
    for linear in (prefix.down, prefix.up):
        bound = linear.in_features**-0.5
        own = nn.Linear(linear.in_features, linear.out_features).requires_grad_(False)
        if start == "uniform":
            assert float(linear.weight.std()) == pytest.approx(float(own.weight.std()), rel=0.02)
            assert 0.95 * bound < float(linear.bias.abs().max()) <= bound
        else:
            assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.02)
            assert not linear.bias.any()


def test_the_parallel_adapter_drops_out_between_its_matrices_in_training_alone(
    backbone_dir: Backbones,
) -> None:
    options = {"parallel_dropout": 0.25, "parallel_bottleneck": 400}
    settings = experiment(backbone_dir("bert"), "mam", options=options)
    tuned = disturbed(build(settings, 2))
    assert not tuned.classifier.shares_rows  # the fused layers do not compute it
    parallel: Any = tuned.classifier.backbone.submodules.layers[0].parallel
    x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = (x @ parallel.down.weight.T + parallel.down.bias).relu()
        (dropped,), _ = seen_by(parallel.dropout, lambda: parallel.eval()(x))
        assert torch.allclose(dropped, inner, atol=1e-6)
        assert torch.allclose(
            parallel(x), inner @ parallel.up.weight.T + parallel.up.bias, atol=1e-5
        )
        outputs: list[Tensor] = []
        _, dropped = seen_by(parallel.dropout, lambda: outputs.append(parallel.train()(x)))
        kept = dropped != 0
        assert torch.allclose(dropped[kept], inner[kept] / 0.75, rtol=1e-4)
        assert float(kept[inner > 0].float().mean()) == pytest.approx(0.75, abs=0.01)
        expected = dropped @ parallel.up.weight.T + parallel.up.bias
    assert torch.allclose(outputs[0], expected, atol=1e-5)
