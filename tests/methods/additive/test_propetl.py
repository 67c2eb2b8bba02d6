"""ProPETL: one prototype, and bits that say which of it each layer has."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from support.backbones import HIDDEN, LAYERS
from support.models import built, disturbed, logits_of
from support.rows import SENTENCES
from torch import nn

from unipelt_cli.config.experiment import resolve
from unipelt_cli.methods.additive.propetl import LayerMask, SharedAdapter, pack, top_share, unpack
from unipelt_cli.methods.building_blocks import Adapter
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.tasks import get_task
from unipelt_cli.training.loop import Training

# ProPETL


def shared(tuned: TunedModel) -> SharedAdapter:
    return cast(SharedAdapter, tuned.classifier.backbone.shared)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_the_kept_share_is_exact_and_a_tie_goes_to_the_first(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.randn(9, 7, generator=generator),
        torch.randint(-2, 3, (9, 7), generator=generator).float(),
        torch.zeros(9, 7),
    ):
        flat = scores.flatten().tolist()
        count = max(1, round(share * 63))
        largest = sorted(range(63), key=lambda place: (-abs(flat[place]), place))[:count]
        expected = torch.zeros(63, dtype=torch.bool)
        expected[largest] = True
        assert torch.equal(top_share(scores, share), expected.view(9, 7))


@pytest.mark.parametrize("count", [1, 7, 8, 64, 1001])
def test_masks_cost_one_bit_a_weight(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack(bits)
    assert packed.tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack(packed, bits.shape), bits)


def test_each_layer_computes_a_plain_adapter_with_its_part_of_the_prototype(
    still_bert: Path,
) -> None:
    tuned = disturbed(built(still_bert, "propetl", share=0.3, reduction=4))
    plain = built(still_bert, "adapter", reduction=4)
    tensors = plain.stored() | {n: t for n, t in tuned.stored().items() if n.startswith("head.")}
    prototype = shared(tuned).prototype
    keeps = []
    for name, mask, part in shared(tuned).each_mask():
        layer, linear = name.split(".")[2], getattr(prototype, part)
        kept = top_share(getattr(mask, part), 0.3)
        keeps.append(kept.flatten())
        own = torch.where(kept, linear.weight, 0.0)
        tensors[f"backbone.submodules.layers.{layer}.adapter.{part}.weight"] = own
        tensors[f"backbone.submodules.layers.{layer}.adapter.{part}.bias"] = linear.bias
    assert not torch.equal(keeps[0], keeps[2])  # the layers keep different parts
    plain.load(tensors)
    expected = logits_of(plain, SENTENCES)
    assert torch.allclose(logits_of(tuned, SENTENCES), expected, atol=1e-6)
    assert not torch.allclose(logits_of(built(still_bert, "head"), SENTENCES), expected, atol=1e-3)


def test_scores_get_the_gradient_of_the_mask_through_their_magnitude(still_bert: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = shared(built(still_bert, "propetl", reduction=4))
    prototype, mask = parts.prototype, cast(LayerMask, parts.masks[0])
    x = torch.randn(5, HIDDEN, generator=generator)
    norm = nn.LayerNorm(HIDDEN)
    (output,) = mask.adapt(norm, (x,))
    target = torch.randn(5, HIDDEN, generator=generator)
    (output * target).sum().backward()
    real = {
        part: top_share(getattr(mask, part), 0.5).float().requires_grad_()
        for part in ("down", "up")
    }
    down, up = prototype.down, prototype.up
    low = (norm(x) @ (down.weight * real["down"]).T + down.bias).relu()
    expected = x + low @ (up.weight * real["up"]).T + up.bias
    assert torch.allclose(output, expected, atol=1e-6)
    gradients = torch.autograd.grad((expected * target).sum(), list(real.values()))
    for part, gradient in zip(real, gradients, strict=True):
        scores = getattr(mask, part)
        assert torch.allclose(scores.grad, gradient * scores.sign(), atol=1e-6)
        dropped = ~top_share(scores, 0.5)
        assert scores.grad[dropped].any()  # what is masked out can come back


def test_scores_start_within_the_authors_bounds() -> None:
    # Their scores are (D, m) for down and (m, D) for up, uniform within one over sqrt(columns).
    hidden, bottleneck = 768, 64
    generator = torch.Generator().manual_seed(0)
    mask = LayerMask(Adapter(hidden, bottleneck, generator), 0.5, generator, folded=False)
    for part, columns in (("down", bottleneck), ("up", hidden)):
        scores = getattr(mask, part).detach()
        assert scores.std().item() == pytest.approx((3 * columns) ** -0.5, rel=0.01)
        assert scores.abs().max().item() == pytest.approx(columns**-0.5, rel=0.001)
    assert mask.down.std().item() == pytest.approx(0.0722, abs=5e-4)
    assert mask.up.std().item() == pytest.approx(0.0208, abs=2e-4)


def test_scores_train_faster_and_never_decay(still_bert: Path) -> None:
    tuned = built(still_bert, "propetl", mask_rate=20.0)
    rows = encode_rows(tuned, [SENTENCES], 128)
    labels = np.array([0, 1, 0, 1])
    settings = resolve([("", {"data": {"task": "sst2"}, "train": {"weight_decay": 0.1}})]).train
    loop = Training(tuned, get_task("sst2"), (rows, labels), (rows, labels), settings)
    names = {id(p): name for name, p in tuned.classifier.named_parameters()}
    found = {
        names[id(p)]: (group["factor"], group["weight_decay"])
        for group in loop.stepper.optimizer.param_groups
        for p in group["params"]
    }
    scores = {name for name, _, _ in shared(tuned).each_mask()}
    assert len(scores) == 2 * LAYERS
    assert {found[f"backbone.{name}"] for name in scores} == {(20.0, 0.0)}
    assert found["backbone.shared.prototype.down.weight"] == (1.0, 0.1)
    assert found["backbone.shared.prototype.down.bias"] == (1.0, 0.0)


def test_propetl_stores_one_prototype_and_bits_and_reads_them_back(
    still_bert: Path, tmp_path: Path
) -> None:
    tuned = disturbed(built(still_bert, "propetl", reduction=5))  # 6 x 32 bits: 24 bytes
    stored = {n: t for n, t in tuned.stored().items() if not n.startswith("head.")}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == (
        4 * (2 * 6 * HIDDEN + 6 + HIDDEN) + LAYERS * 2 * 6 * HIDDEN // 8
    )
    fresh = built(still_bert, "propetl", folded=True, reduction=5)
    fresh.load(tuned.stored())
    for (_, mask, part), (_, again, _) in zip(
        shared(tuned).each_mask(), shared(fresh).each_mask(), strict=True
    ):
        assert torch.equal(mask.kept(part), again.kept(part))
        assert again.kept(part).sum() == 6 * HIDDEN // 2
    assert torch.equal(logits_of(tuned, SENTENCES), logits_of(fresh, SENTENCES))
