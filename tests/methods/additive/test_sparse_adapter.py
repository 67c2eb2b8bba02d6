"""SparseAdapter keeps the entries that SNIP scores highest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import save_backbone
from support.by_hand import hidden_of
from support.models import by_the_hooks, experiment, loop_on_sixteen
from support.rows import SIXTEEN, SIXTEEN_LABELS
from torch.nn import functional

from unipelt_cli.methods.additive.sparse_adapter import SparseAdapter, _pack, _unpack
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.training.events import Epoch


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone without dropout, whose gradients do not depend on luck."""
    directory = tmp_path_factory.mktemp("calm") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def sparse(tuned: TunedModel) -> Any:
    return tuned.classifier.backbone.get_submodule("sparsity")


@pytest.mark.parametrize("base", ["pfeiffer", "houlsby"])
def test_snip_keeps_the_entries_whose_removal_would_change_the_loss_most(
    calm: Path, base: str
) -> None:
    settings = experiment(calm, "sparse-adapter", options={"base": base, "kept": 0.3})
    tuned, twin = build(settings, 2), build(settings, 2)
    rows = encode_rows(twin, [SIXTEEN], 128)
    logits = twin.classifier(**rows.batch(range(16), twin.device))
    functional.cross_entropy(logits, torch.as_tensor(SIXTEEN_LABELS)).backward()
    own = dict(twin.classifier.backbone.named_parameters())
    scores = torch.cat([(own[n] * own[n].grad).abs().flatten() for n in sparse(twin).names])
    names = [n for n, p in own.items() if p.requires_grad and p.ndim == 2]
    assert sorted(sparse(twin).names) == sorted(names)
    count = round(0.3 * len(scores))
    loop_on_sixteen(tuned, epochs=1)._prepare()
    mask = sparse(tuned).mask
    assert mask.sum() == count
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-4)


def test_entries_that_are_not_kept_stay_zero_under_decay_and_momentum(calm: Path) -> None:
    tuned = build(experiment(calm, "sparse-adapter"), 2)
    loop = loop_on_sixteen(tuned, epochs=3, learning_rate=1e-2, weight_decay=0.1)
    losses = [event.train_loss for event in loop.events() if isinstance(event, Epoch)]
    assert losses[-1] < losses[0]
    own = dict(tuned.classifier.backbone.named_parameters())
    flat = torch.cat([own[name].flatten() for name in sparse(tuned).names])
    assert not flat[~sparse(tuned).mask].any()
    stored = tuned.stored()
    assert stored["backbone.sparsity.bits"].dtype == torch.uint8
    assert stored["backbone.sparsity.bits"].numel() == -(-len(flat) // 8)
    assert stored["backbone.sparsity.kept"].numel() == round(len(flat) / 2)


@pytest.mark.parametrize("score", ["snip", "random"])
def test_a_sparse_run_goes_on_with_the_same_entries(calm: Path, score: str) -> None:
    settings = experiment(calm, "sparse-adapter", options={"score": score})
    train = {"epochs": 3, "learning_rate": 1e-2}
    whole = loop_on_sixteen(build(settings, 2), **train)
    list(whole.events())
    begun = loop_on_sixteen(build(settings, 2), **train)
    next(event for event in begun.events() if isinstance(event, Epoch))
    tensors, counters = begun.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = loop_on_sixteen(build(settings, 2), **train)
    resumed.restore(saved, counters)
    list(resumed.events())
    ours, theirs = resumed.tuned.stored(), whole.tuned.stored()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 64, 100])
def test_packed_bits_come_back(entries: int) -> None:
    mask = torch.rand(entries, generator=torch.Generator().manual_seed(entries)) < 0.5
    assert torch.equal(_unpack(_pack(mask), entries), mask)
    assert len(_pack(mask)) == -(-entries // 8)


def test_everything_may_be_kept(calm: Path) -> None:
    tuned = build(experiment(calm, "sparse-adapter", options={"kept": 1.0, "reduction": 16}), 2)
    plain = by_the_hooks(build(experiment(calm, "adapter"), 2))
    loop_on_sixteen(tuned, epochs=1)._prepare()
    assert isinstance(tuned.method, SparseAdapter)
    assert torch.equal(hidden_of(tuned), hidden_of(plain))
