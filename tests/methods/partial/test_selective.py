"""Selective methods train the tensors that they name, and no others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.partial import made
from torch import nn

from unipelt_cli.errors import BackboneError

LAYOUTS = ["bert", "roberta", "electra", "distilbert"]


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_top_layers_trains_the_last_layers_and_the_pooler(
    backbone_dir: Callable[[str], Path], model_type: str
) -> None:
    backbone = made(backbone_dir(model_type), "top-layers").classifier.backbone
    names = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert names == {
        name
        for name, _ in backbone.named_parameters()
        if ".layer.1." in name or name.startswith("pooler.")
    }
    both = made(backbone_dir(model_type), "top-layers", layers=2).classifier.backbone
    assert not any(p.requires_grad for n, p in both.named_parameters() if n.startswith("embed"))
    assert all(p.requires_grad for n, p in both.named_parameters() if ".layer." in n)


def test_more_layers_than_there_are_is_refused(backbone_dir: Callable[[str], Path]) -> None:
    with pytest.raises(BackboneError, match=r"method\.layers = 3: it has 2") as caught:
        made(backbone_dir("distilbert"), "top-layers", layers=3)
    assert caught.value.hint == "set 2 or less"


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_layernorm_trains_every_layernorm_and_nothing_else(
    backbone_dir: Callable[[str], Path], model_type: str
) -> None:
    backbone = made(backbone_dir(model_type), "layernorm").classifier.backbone
    norms = {
        parameter
        for module in backbone.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    assert {p for p in backbone.parameters() if p.requires_grad} == norms


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_subset_of_bitfit_is_two_biases_a_layer(
    backbone_dir: Callable[[str], Path], model_type: str
) -> None:
    tuned = made(backbone_dir(model_type), "bitfit", places="query-intermediate")
    layout, backbone = tuned.pretrained.layout, tuned.classifier.backbone
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        f"{layout.layers}.{layer}.{path}.bias"
        for layer in range(2)
        for path in (layout.query, layout.intermediate)
    }
