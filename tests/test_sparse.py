"""Methods that train a part of the backbone's own entries: which part, and nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, bert_base_counts, experiment, logits_of, save_backbone
from torch import Tensor, nn

from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import BackboneError
from unipelt_cli.methods.base import Moment, Pass
from unipelt_cli.methods.partial.diff_pruning import (
    Differences,
    expected_gate,
    open_chance,
    sample_gate,
    sampled_difference,
)
from unipelt_cli.methods.partial.overlay import Deltas, Overlay, top
from unipelt_cli.methods.partial.sparse_updates import pack, sparse, unpack
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned, merge
from unipelt_cli.tasks import get_task
from unipelt_cli.training.events import Epoch, Step
from unipelt_cli.training.loop import Training

LABELS = np.array([0, 1] * 6)
ROWS = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(12)]
LAYOUTS = ["bert", "roberta", "electra", "distilbert"]
NATIVE = {"pooling": "native"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone without dropout: training and evaluation see the same function."""
    directory = tmp_path_factory.mktemp("calm") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def made(directory: Path, method: str, model: dict[str, Any] = NATIVE, **options: Any) -> Tuned:
    return build(experiment(directory, method, model=model, options=options), 2)


def training(tuned: Tuned, **train: Any) -> Training:
    settings = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "warmup": 0.0, **train}
    resolved = resolve([("", {"data": {"task": "sst2"}, "train": settings})]).train
    rows = encode_rows(tuned, [ROWS], 128)
    return Training(tuned, get_task("sst2"), (rows, LABELS), (rows, LABELS), resolved)


def prepared(tuned: Tuned) -> Tuned:
    loop = training(tuned)
    next(loop.events())
    return tuned


def pristine(directory: Path) -> dict[str, Tensor]:
    return dict(made(directory, "head").classifier.backbone.named_parameters())


def gradients(tuned: Tuned, rows: list[int]) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of some rows, worked out without the loop."""
    tuned.classifier.zero_grad()
    batch = encode_rows(tuned, [[ROWS[row] for row in rows]], 128)
    logits = tuned.classifier(**batch.batch(range(len(rows)), tuned.device))
    chances = logits.softmax(1)[torch.arange(len(rows)), torch.as_tensor(LABELS[rows])]
    (-chances.log().mean()).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in tuned.classifier.backbone.named_parameters()
    }


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def largest(scores: Tensor, count: int) -> list[int]:
    order = np.lexsort((np.arange(len(scores)), -scores.numpy()))
    return sorted(order[:count].tolist())


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("top-layers", {}, 21_854_208, 21_854_208),
        ("top-layers", {"layers": 1}, 7_678_464, 7_678_464),
        ("top-layers", {"layers": 6}, 43_117_824, 43_117_824),
        ("layernorm", {}, 38_400, 38_400),
        ("bitfit", {"places": "query-intermediate"}, 46_080, 46_080),
        ("fish-mask", {}, 545_880, 545_880),
        ("child-tuning-f", {}, 109_482_240, 109_482_240),
        (
            "child-tuning-d",
            {},
            25_516_339 + 24_427_776,
            25_516_339 + 24_427_776 + 85_054_464 // 32,
        ),
        ("diff-pruning", {}, 2 * 109_482_240 + 199, 547_411),
    ],
)
def test_counts_on_bert_base_are_the_papers(
    name: str, options: dict[str, object], trainable: int, stored: int
) -> None:
    assert bert_base_counts(name, **options) == (trainable, stored)


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


@pytest.mark.parametrize("count", range(1, 31))
def test_the_largest_win_and_of_equal_ones_the_first(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 4, (30,), generator=generator).float()
    found = top(scores, count)
    assert found.dtype == torch.int32
    assert found.tolist() == largest(scores, count)


@pytest.mark.parametrize("samples", [1024, 3])
def test_the_mask_is_the_fisher_information_example_by_example(calm: Path, samples: int) -> None:
    tuned = prepared(made(calm, "fish-mask", samples=samples))
    reference = made(calm, "full")
    used = range(min(samples, len(ROWS)))
    fisher = sum(flat(gradients(reference, [row])).double() ** 2 for row in used)
    assert isinstance(fisher, Tensor)
    own = sparse(tuned.classifier.backbone)
    count = int(0.005 * (len(fisher) + 66)) - 66
    assert own.entries.places.tolist() == largest(fisher, count)
    batch = flat(gradients(reference, list(used))).double() ** 2
    assert own.entries.places.tolist() != largest(batch, count)


def test_the_fisher_information_is_taken_without_dropout(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = prepared(made(backbone_dir("bert"), "fish-mask"))
    reference = made(backbone_dir("bert"), "full")
    assert not reference.classifier.training
    fisher = sum(flat(gradients(reference, [row])).double() ** 2 for row in range(len(ROWS)))
    assert isinstance(fisher, Tensor)
    places = sparse(tuned.classifier.backbone).entries.places.tolist()
    assert places == largest(fisher, len(places))


@pytest.mark.parametrize("method", ["fish-mask", "diff-pruning"])
def test_what_was_not_chosen_stays_to_the_bit_and_the_rest_is_pretrained_plus_delta(
    calm: Path, method: str
) -> None:
    tuned = made(calm, method)
    list(training(tuned, weight_decay=0.5).events())
    before = pristine(calm)
    backbone = tuned.classifier.backbone
    now = dict(backbone.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    own = sparse(backbone)
    places, deltas = own.entries.places.clone(), own.deltas.detach().clone()
    assert (places.diff() > 0).all()
    expected = flat(before)
    expected[places.long()] += deltas
    merge(tuned)
    assert torch.equal(flat(dict(backbone.named_parameters())), expected)
    moved = (expected != flat(before)).nonzero()[:, 0]
    assert len(moved) > 0.9 * len(places)


def test_an_entry_of_the_gradient_is_kept_or_dropped_so_that_its_mean_stays(calm: Path) -> None:
    tuned = made(calm, "child-tuning-f", kept=0.3)
    backbone = tuned.classifier.backbone
    torch.manual_seed(5)
    gradient = {name: torch.randn_like(p) for name, p in backbone.named_parameters()}
    total = {name: torch.zeros_like(g) for name, g in gradient.items()}
    draws = 400
    for _ in range(draws):
        for name, parameter in backbone.named_parameters():
            parameter.grad = gradient[name].clone()
        tuned.method.after_backward(backbone, Moment(0, 0, 1))
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad
    last = flat({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    whole = flat(gradient)
    kept = last != 0
    assert torch.allclose(last[kept], whole[kept] / 0.3)
    assert abs(float(kept.float().mean()) - 0.3) < 0.01
    ratio = flat(total) / draws / whole
    assert abs(float(ratio.mean()) - 1) < 0.005
    # one entry's mean of 400 draws has the deviation sqrt(0.7 / 0.3 / 400) = 0.076
    assert abs(float(ratio.std()) - 0.0764) < 0.005


def test_the_child_is_the_layers_largest_mean_square_of_clipped_gradients(calm: Path) -> None:
    tuned = prepared(made(calm, "child-tuning-d", batch_size=5))
    reference = made(calm, "full")
    total: dict[str, Tensor] = {}
    for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]):
        for name, gradient in gradients(reference, rows).items():
            if name.startswith("encoder.layer."):
                clipped = gradient / max(1.0, float(gradient.norm()) + 1e-6)
                total[name] = total.get(name, torch.zeros(())) + clipped**2 / 3
    child = tuned.classifier.backbone.child
    assert child.places.tolist() == largest(flat(total), int(0.3 * len(flat(total))))


def test_the_child_is_chosen_with_dropout(calm: Path) -> None:
    tuned = made(calm, "child-tuning-d")
    loop = training(tuned)
    seen: list[bool] = []

    def losses(*arguments: Any, **options: Any) -> Iterator[Tensor]:
        for loss in loop._losses(*arguments, **options):
            seen.append(tuned.classifier.training)
            yield loss

    tuned.method.prepare(tuned.classifier.backbone, losses)
    assert seen == [True]


def test_outside_the_child_nothing_moves_whatever_decays(calm: Path) -> None:
    tuned = made(calm, "child-tuning-d")
    list(training(tuned, weight_decay=0.5).events())
    backbone, before = tuned.classifier.backbone, pristine(calm)
    layers = {n: p for n, p in backbone.named_parameters() if n.startswith("encoder.layer.")}
    old = flat({name: before[name] for name in layers})
    chosen = torch.zeros(len(old), dtype=torch.bool)
    chosen[backbone.child.places.long()] = True
    moved = flat(layers) != old
    assert not moved[~chosen].any()
    assert moved[chosen].float().mean() > 0.99
    others = {n: p for n, p in backbone.named_parameters() if n not in layers}
    assert {"pooler.dense.weight", "embeddings.LayerNorm.weight"} <= others.keys()
    whole = [n for n in others if "position" not in n and "word" not in n and "type" not in n]
    assert all((others[name] != before[name]).all() for name in whole)
    # decay alone moves what no row names
    assert (
        others["embeddings.word_embeddings.weight"][99]
        != before["embeddings.word_embeddings.weight"][99]
    ).all()


@pytest.mark.parametrize("total", [1, 8, 21])
def test_bits_are_packed_and_unpacked(total: int) -> None:
    places = torch.arange(0, total, 3, dtype=torch.int32)
    bits = np.zeros(total, dtype=np.uint8)
    bits[places.numpy()] = 1
    packed = pack(places, total)
    assert packed.numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
    assert torch.equal(unpack(packed), places)
    assert unpack(packed).dtype == torch.int32


@pytest.mark.parametrize("alpha", [-30.0, -2.0, 0.0, 0.7, 5.0, 30.0])
def test_a_gate_is_what_its_draws_are_on_average(alpha: float) -> None:
    torch.manual_seed(3)
    draws = sample_gate(torch.full((400_000,), alpha))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean() - expected_gate(torch.tensor([alpha]))) < 2e-3
    assert abs((draws > 0).float().mean() - open_chance(torch.tensor(alpha))) < 2e-3


def test_the_expected_gate_is_the_integral() -> None:
    alpha = torch.tensor([-3.0, 0.0, 1e-4, 5.0, 12.0], dtype=torch.float64)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    exact = (alpha[:, None] - ((t + 1.5) / 3).logit()).sigmoid().mean(1)
    assert (expected_gate(alpha) - exact).abs().max() < 1e-6


def test_a_sampled_difference_is_what_its_parts_give_with_their_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(3)]
    results, gradients = [], []
    for fused in (True, False):
        w, alpha = (tensor.clone().requires_grad_() for tensor in start[:2])
        gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(6)
        result = sampled_difference(w, alpha, gate) if fused else w * (sample_gate(alpha) * gate)
        (result * start[2]).sum().backward()
        results.append(result.detach())
        gradients.append([w.grad, alpha.grad, gate.grad])
    assert torch.allclose(*results)
    assert 0.2 < float((results[0] == 0).double().mean()) < 0.8
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain)


def test_the_penalty_is_the_expected_number_of_entries_that_differ(calm: Path) -> None:
    tuned = made(calm, "diff-pruning", penalty=1e-3)
    differences = tuned.classifier.backbone.differences
    assert isinstance(differences, Differences)
    torch.manual_seed(8)
    with torch.no_grad():
        differences.w.fill_(1.0)
        differences.alpha.normal_(0.0, 2.0)
        differences.groups.normal_(0.0, 2.0)
        drawn = torch.stack(
            [
                torch.cat([(part != 0).float() for part in differences.train().gated()]).sum()
                for _ in range(400)
            ]
        )
        count = float(differences.expected_count())
    # the groups' gates open whole tensors at a time, so the mean is rough: 4 deviations
    assert abs(count - float(drawn.mean())) < 4 * float(drawn.std()) / 20
    step = Pass(
        tuned.classifier.backbone,
        {},
        Moment(0, 0, 1),
        is_regression=False,
        forward=lambda: torch.tensor([3.0]),
        criterion=lambda logits: logits.sum(),
    )
    assert float(tuned.method.loss(step).detach()) == pytest.approx(3.0 + 1e-3 * count)


def test_evaluation_sees_expected_gates_and_training_sees_draws(calm: Path) -> None:
    tuned = made(calm, "diff-pruning")
    differences = tuned.classifier.backbone.differences
    with torch.no_grad():
        differences.w.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        differences.alpha.zero_()
        assert torch.equal(logits_of(tuned, SENTENCES), logits_of(tuned, SENTENCES))
        batch = encode_rows(tuned, [SENTENCES], 128).batch(range(4), tuned.device)
        tuned.classifier.train()
        assert not torch.equal(tuned.classifier(**batch), tuned.classifier(**batch))
        (first,) = list(differences.eval().gated())[:1]
    gate = expected_gate(torch.zeros(1)) * expected_gate(torch.full((1,), 5.0))
    assert torch.allclose(first, differences.w[: len(first)] * gate, atol=1e-6)


def test_pruning_keeps_the_share_of_largest_expected_differences_exactly(calm: Path) -> None:
    tuned = made(calm, "diff-pruning", share=0.01)
    backbone, loop = tuned.classifier.backbone, training(tuned, epochs=4)
    differences = backbone.differences
    assert isinstance(differences, Differences)
    events = loop.events()
    while loop.progress.epoch < 3:
        next(events)
    with torch.no_grad():
        expected = torch.cat(list(differences.eval().gated()))
    next(events)  # the second stage's first step
    own = sparse(backbone)
    count = int(0.01 * len(expected))
    assert len(own.deltas) == count
    assert own.entries.places.tolist() == largest(expected.abs(), count)
    assert not hasattr(backbone, "differences")
    assert sum(p.numel() for p in differences.parameters()) == 0
    trained = {name for name, p in tuned.classifier.named_parameters() if p.requires_grad}
    assert trained == {"backbone.sparse.deltas", "head.out.weight", "head.out.bias"}
    assert set(loop.parameters) == trained
    step = (own.deltas - expected[own.entries.places.long()]).abs()
    assert 0 < step.max() < 0.011  # one step of AdamW from the pruned values


@pytest.mark.parametrize("method", ["fish-mask", "child-tuning-f", "child-tuning-d"])
@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    backbone_dir: Callable[[str], Path], method: str, stop_after: int
) -> None:
    goes_on(backbone_dir("bert"), method, stop_after)


@pytest.mark.parametrize("stop_after", [1, 5, 8, 9, 11])
def test_pruning_goes_on_bit_for_bit_in_either_stage(
    backbone_dir: Callable[[str], Path], stop_after: int
) -> None:
    goes_on(backbone_dir("bert"), "diff-pruning", stop_after)


def goes_on(directory: Path, method: str, stop_after: int) -> None:
    """Stop a run after some events; going on must give what an unbroken run gives."""
    whole = training(made(directory, method), epochs=4)
    expected = [e.loss for e in whole.events() if isinstance(e, Step)]
    stopped = training(made(directory, method), epochs=4)
    events = stopped.events()
    seen = [next(events) for _ in range(stop_after)]
    tensors, counters = stopped.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = training(made(directory, method), epochs=4)
    resumed.restore(saved, counters)
    rest = [e.loss for e in resumed.events() if isinstance(e, Step)]
    assert [e.loss for e in seen if isinstance(e, Step)] + rest == expected
    ours, theirs = resumed.tuned.stored(), whole.tuned.stored()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(isinstance(e, Epoch) for e in seen) == stop_after // 4


class Doubled(Overlay):
    def weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self.own:
            yield parameter, 2 * parameter


class Pair(nn.Module):
    """Two linear units with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        if not torch.isfinite(result).all():
            raise ValueError("not a number")
        return result


def test_a_pass_sees_a_tied_tensor_everywhere_and_leaves_no_trace() -> None:
    pair = Pair()
    x = torch.eye(3)
    plain = pair(x)
    overlay = Doubled(dict(pair.named_parameters()))
    overlay.lay_over(pair)
    assert torch.allclose(pair(x), 4 * plain)
    names = list(pair.state_dict())
    with pytest.raises(ValueError, match="not a number"):
        pair(x / 0)
    assert "weight" not in vars(pair.first)
    assert pair.first.weight is pair.second.weight
    overlay.merge()
    assert torch.allclose(pair(x), 4 * plain)
    assert list(pair.state_dict()) == names


@pytest.mark.parametrize("method", ["fish-mask", "diff-pruning"])
def test_a_delta_smaller_than_bf16_can_see_is_kept(calm: Path, method: str) -> None:
    settings = experiment(calm, method, model=NATIVE, train={"precision": "bf16"})
    tuned = build(settings, 2, folded=True)
    own = sparse(tuned.classifier.backbone)
    assert isinstance(own, Deltas)
    assert all(p.dtype == torch.float32 for p in tuned.classifier.parameters())
    with torch.no_grad():
        own.deltas.fill_(1e-5)
    (_, weight), *_ = own.weights()
    assert weight.dtype == torch.float32
    assert torch.equal(weight.flatten()[:5], own.own[0].flatten()[:5] + 1e-5)
