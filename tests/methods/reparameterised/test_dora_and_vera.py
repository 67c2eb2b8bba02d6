"""DoRA rescales rows; VeRA scales matrices that all layers share."""

import torch
from support.backbones import Backbones
from support.models import disturbed, experiment, logits_of, seen_by, tuned_of
from support.rows import SENTENCES
from torch import Tensor
from torch.nn import functional

from unipelt_cli.models.build import build


def test_dora_starts_as_the_backbone_and_rescales_rows_but_not_the_bias(
    backbone_dir: Backbones,
) -> None:
    directory = backbone_dir("bert")
    tuned = tuned_of(directory, "dora", options={"rank": 3})
    plain = tuned_of(directory, "head")
    read = "encoder.layer.0.attention.self.query"
    for model in (tuned, plain):
        model.classifier.eval()
    outputs = [
        seen_by(model.classifier.backbone.encoder, lambda m=model: logits_of(m, SENTENCES))[1][0]
        for model in (tuned, plain)
    ]
    assert torch.equal(*outputs)

    disturbed(tuned)
    linear = tuned.classifier.backbone.get_submodule(read)
    own = tuned.classifier.backbone.updates.layers[0]["query"]
    direction = linear.weight + 2.0 * own.b @ own.a
    weight = torch.stack([own.magnitude[o] * v / v.norm() for o, v in enumerate(direction)])
    (x,), output = seen_by(linear, lambda: logits_of(tuned, SENTENCES))
    assert torch.allclose(output, x @ weight.T + linear.bias, atol=1e-5)
    merged = own.merged(linear.weight)
    assert torch.allclose(merged, weight, atol=1e-6)
    assert torch.allclose(merged.norm(dim=1), own.magnitude.abs(), atol=1e-6)


def test_doras_norm_is_a_constant_in_the_backward_pass(backbone_dir: Backbones) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), "dora", options={"rank": 3}))
    linear = tuned.classifier.backbone.encoder.layer[0].attention.self.query
    own = tuned.classifier.backbone.updates.layers[0]["query"]
    x, way = torch.randn(5, 32), torch.randn(5, 32)

    def gradient(*, constant: bool) -> Tensor:
        direction = linear.weight + 2.0 * own.b @ own.a
        norm = direction.norm(dim=1)
        norm = norm.detach() if constant else norm
        output = x @ ((own.magnitude / norm)[:, None] * direction).T + linear.bias
        return torch.autograd.grad((output * way).sum(), own.a)[0]

    found = torch.autograd.grad((linear(x) * way).sum(), own.a)[0]
    assert torch.allclose(found, gradient(constant=True), atol=1e-5)
    assert not torch.allclose(found, gradient(constant=False), atol=1e-3)


def test_vera_scales_matrices_that_all_layers_share_and_no_run_stores(
    backbone_dir: Backbones,
) -> None:
    settings = experiment(backbone_dir("bert"), "vera", options={"rank": 6})
    tuned = disturbed(build(settings, 2))
    updates = tuned.classifier.backbone.updates
    folded = build(settings, 2, folded=True).classifier.backbone.updates
    other = build(settings.with_("train", seed=43), 2).classifier.backbone.updates
    for name in ("a", "b"):
        matrix = getattr(updates.shared, name)
        assert torch.equal(matrix, getattr(folded.shared, name))
        assert not torch.equal(matrix, getattr(other.shared, name))
    assert {n for n in tuned.stored() if n.startswith("backbone")} == {
        f"backbone.updates.layers.{layer}.{place}.{name}"
        for layer in (0, 1)
        for place in ("query", "value")
        for name in ("d", "b")
    }
    a, b = updates.shared.a, updates.shared.b
    for index, layer in enumerate(tuned.classifier.backbone.encoder.layer):
        linear = layer.attention.self.value
        own = updates.layers[index]["value"]
        weight = torch.diag(own.b) @ b @ torch.diag(own.d) @ a
        (x,), output = seen_by(linear, lambda: logits_of(tuned, SENTENCES))
        assert (x @ weight.T).abs().max() > 0.01
        expected = functional.linear(x, linear.weight + weight, linear.bias)
        assert torch.allclose(output, expected, atol=1e-5)


def test_vera_starts_as_the_backbone_with_the_papers_numbers(backbone_dir: Backbones) -> None:
    updates = tuned_of(backbone_dir("bert"), "vera").classifier.backbone.updates
    for update in updates:
        assert torch.equal(update.d, torch.full((256,), 0.1))
        assert not update.b.any()
