"""Where heads start and end; runs over pairs train apart as well as in one pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.backbones import WORDS, Backbones, save_backbone
from support.models import experiment
from torch import Tensor
from torch.nn import functional

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.methods.linear_fits import ABSENT
from unipelt_cli.metrics import METRICS, Values
from unipelt_cli.models import sharing
from unipelt_cli.models.build import build
from unipelt_cli.models.classifier import STEEPNESS
from unipelt_cli.models.evaluation import compute_features, compute_logits, encode_rows
from unipelt_cli.tasks import get_task
from unipelt_cli.training import shared_passes
from unipelt_cli.training.events import Step, TaskRows
from unipelt_cli.training.heads.start_and_end import RIDGE, fit, start_heads
from unipelt_cli.training.loop import Training

APART = {"pairs": "apart", "pooling": "mean"}


def texts_of(seed: int, count: int) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [
        [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(count)]
        for _ in range(2)
    ]


def loop_of(
    backbone: Path,
    seed: int,
    count: int,
    name: str = "mrpc",
    start: str = "means",
    end: str = "trained",
    rate: float = 1e-2,
    **model: Any,
) -> Training:
    options: dict[str, Any] = {
        "seed": seed,
        "epochs": 8,
        "batch_size": 6,
        "patience": 8,
        "learning_rate": rate,
    }
    options |= {"head_start": start, "head_end": end}
    settings = experiment(backbone, "unipelt-apl", model={**APART, **model}, train=options)
    task = get_task(name)
    tuned = build(settings, task.outputs, pairs=[True])
    labels = np.arange(count) % 2 if task.labels else np.linspace(0, 5, count)
    labelled = (encode_rows(tuned, texts_of(seed, count), 128), labels)
    return Training(tuned, task, labelled, labelled, settings.train)


def steps_of(loop: Training, count: int) -> list[float]:
    losses: list[float] = []
    events = loop.events()
    while len(losses) < count:
        if isinstance(event := next(events), Step):
            losses.append(event.loss)
    return losses


def test_a_fit_to_values_is_the_line_of_least_squares() -> None:
    random = np.random.default_rng(0)
    cosines = random.uniform(0.2, 0.9, 50)
    values = 7 * cosines - 2 + random.normal(0, 0.1, 50)
    slopes, offsets = fit(torch.tensor(cosines), torch.tensor(values), 1)
    expected = np.polyfit(cosines, values, 1)
    assert [float(slopes), float(offsets)] == pytest.approx(expected.tolist(), rel=5e-3)


def test_a_fit_to_labels_tells_them_apart() -> None:
    cosines = torch.linspace(0, 1, 30, dtype=torch.float64)
    labels = (cosines > 0.4).long() + (cosines > 0.8).long()
    slopes, offsets = fit(cosines, labels, 3)
    answers = (cosines[:, None] * slopes + offsets).argmax(1)
    assert float((answers == labels).double().mean()) >= 0.9


@pytest.mark.parametrize("classes", [2, 3])
def test_a_fit_to_labels_is_where_loss_and_penalty_are_least(classes: int) -> None:
    cosines = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % classes
    slopes, offsets = fit(cosines, labels, classes)
    mean, deviation = cosines.mean(), cosines.std(correction=0)
    weight = (slopes * deviation).requires_grad_()
    bias = (offsets + slopes * mean).requires_grad_()
    logits = ((cosines - mean) / deviation)[:, None] * weight + bias
    error = functional.cross_entropy(logits, labels) + RIDGE * weight.square().sum()
    for gradient in torch.autograd.grad(error, [weight, bias]):
        assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("normalise", [False, True])
def test_a_regression_starts_with_the_cosines_own_order(bert: Path, normalise: bool) -> None:
    loop = loop_of(bert, 3, 20, "stsb", normalise=normalise)
    tuned, (rows, _) = loop.tuned, loop.train
    with torch.no_grad():
        features = tuned.classifier.features(**rows.batch(range(20), torch.device("cpu")))
    labels = 5 * features[:, -1].numpy()  # what a line of the cosine says
    start_heads(tuned, [TaskRows(loop.task, (rows, labels), (rows, labels))], "random")
    said = compute_logits(tuned, rows)[:, 0]
    assert METRICS["spearman"](said, labels, 1) >= 0.999
    assert said == pytest.approx(labels, abs=0.01)  # its features keep their lengths


def test_a_joint_head_starts_as_it_did(bert: Path) -> None:
    loop = loop_of(bert, 3, 12, start="random", pairs="joint")
    before = {name: tensor.clone() for name, tensor in loop.parameters.items()}
    loop._prepare()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loop.parameters.items())


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_architecture_trains_on_pairs_after_the_start(
    backbone_dir: Backbones, model_type: str
) -> None:
    loop = loop_of(backbone_dir(model_type), 1, 12)
    before = {name: tensor.clone() for name, tensor in loop.parameters.items()}
    assert np.isfinite(steps_of(loop, 6)).all()
    moved = {name for name, own in loop.parameters.items() if not torch.equal(own, before[name])}
    assert {"head.out.weight", "head.out.bias"} <= moved
    for part in ("adapter.up", "gates", "submodules.prefix"):
        assert any(part in name for name in moved), (part, sorted(before))


@pytest.mark.parametrize("device_rows", ["ragged", "padded"])
def test_runs_on_pairs_in_one_pass_are_what_each_is_alone(
    bert: Path, device_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_rows == "padded":  # as on a GPU: every run with as many rows and tokens
        from unipelt_cli.methods.unipelt.fused import batching

        monkeypatch.setattr(batching, "shares_out", lambda device: False)
        monkeypatch.setattr(shared_passes, "shares_out", lambda device: False)
    sizes = {0: 17, 1: 20, 2: 9}
    rate = 1e-3  # at 1e-2 Adam makes 1e-5 of what another order of sums rounds away
    alone = {name: loop_of(bert, name, count, rate=rate) for name, count in sizes.items()}
    loops = {name: loop_of(bert, name, count, rate=rate) for name, count in sizes.items()}
    expected = {name: steps_of(loop, 10) for name, loop in alone.items()}
    for name in (1, 2):
        sharing.share(loops[0].tuned, loops[name].tuned)
    losses: dict[int, list[float]] = {name: [] for name in loops}
    for name, event in shared_passes.train_together(loops):
        if isinstance(event, Step) and len(losses[name]) < 10:
            losses[name].append(event.loss)
        if all(len(own) == 10 for own in losses.values()):
            break
    for name in sizes:
        assert losses[name] == pytest.approx(expected[name], abs=1e-5)


def test_a_batch_in_parts_takes_the_step_of_the_whole(tmp_path: Path) -> None:
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    backbone = save_backbone(tmp_path, "bert", **no_dropout)
    whole, parts = (loop_of(backbone, 1, 12) for _ in range(2))
    parts.progress.micro_batch_size = 2
    assert steps_of(parts, 8) == pytest.approx(steps_of(whole, 8), abs=1e-4)


def test_evaluation_in_smaller_batches_computes_the_same(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(bert, 1, 12)
    whole, sizes = compute_logits(loop.tuned, loop.train[0]), list[int]()
    pooled = loop.tuned.classifier.pooled

    def exhausted(attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(attention_mask))
        if len(attention_mask) > 6:
            raise MemoryError
        return pooled(attention_mask, **inputs)

    monkeypatch.setattr(loop.tuned.classifier, "pooled", exhausted)
    assert compute_logits(loop.tuned, loop.train[0]) == pytest.approx(whole, abs=1e-5)
    assert sizes == [24, 12, 6, 6, 12, 6, 6]


def logits_of_means(read: Tensor, labels: Values, outputs: int) -> Tensor:
    """Say for each row how far it lies from the middle of all classes towards each class."""
    present = np.unique(labels).tolist()
    means = {label: read[labels == label].mean(0) for label in present}
    middle = torch.stack(list(means.values())).mean(0)
    logits = torch.full((len(read), outputs), ABSENT)
    for label, mean in means.items():
        towards = (mean - middle) / (mean - middle).norm()
        logits[:, label] = STEEPNESS / read.norm(dim=1).mean() * ((read - middle) @ towards)
    return logits


def loop_over_labels(backbone: Path, labels: list[int], **train: Any) -> Training:
    """Return a loop over as many sentences, of which some classes may have none."""
    task = replace(get_task("sst2"), labels=tuple("abcdef"))
    options = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "head_end": "means", **train}
    model = {"normalise": True, "pooling": "mean"}
    settings = experiment(backbone, "unipelt-apl", model=model, train=options)
    tuned = build(settings, task.outputs)
    rows = encode_rows(tuned, texts_of(3, len(labels))[:1], 128)
    dev = None if train.get("patience") is None else (rows, np.array(labels))
    return Training(tuned, task, (rows, np.array(labels)), dev, settings.train)


@pytest.mark.parametrize("labels", [[0, 1, 2, 4, 4, 4, 1, 1, 1, 0], [1, 3] * 4, [2] * 5])
def test_a_head_ends_at_the_means_of_the_tuned_rows(bert: Path, labels: list[int]) -> None:
    loop = loop_over_labels(bert, labels)
    list(loop.events())
    assert loop.head_end == "means"
    tuned, (rows, numbers) = loop.tuned, loop.train
    read = torch.from_numpy(compute_features(tuned, rows))
    read = functional.normalize(read, dim=1)
    if len(set(labels)) > 1:
        expected = logits_of_means(read, numbers, 6)
        assert torch.from_numpy(compute_logits(tuned, rows)).allclose(expected, atol=1e-4)
    else:
        assert (compute_logits(tuned, rows).argmax(1) == labels).all()
    away = torch.randn(1000, read.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = tuned.classifier.read(away).argmax(1)
    assert set(answers.tolist()) == set(labels), "a class without a row is never answered"


def test_a_trained_head_stays_where_dev_prefers_it(bert: Path) -> None:
    labels = [0, 1] * 6
    trained = loop_over_labels(bert, labels, patience=9, epochs=9, head_end="trained")
    ended = loop_over_labels(bert, labels, patience=9, epochs=9)
    for loop in (trained, ended):
        list(loop.events())
    assert ended.progress.best_score >= trained.progress.best_score
    assert trained.head_end == "trained"
    rows, numbers = ended.train
    answers = compute_logits(ended.tuned, rows).argmax(1)
    assert ended.task.score(answers, numbers) == ended.progress.best_dev
    refused = loop_over_labels(bert, labels, patience=9, epochs=9)
    events = refused.events()
    for _ in range(3 * 9 + 9):
        next(events)
    refused.progress.best_score = 2.0  # as if the trained head had been better than any
    list(events)
    assert refused.head_end == "trained"
    assert torch.equal(refused.best["head.out.weight"], refused.tuned.classifier.head.out.weight)


@pytest.mark.parametrize("labels", [(0, 1), (1,)])
def test_a_head_over_pairs_ends_as_a_regression_on_the_tuned_rows(
    bert: Path, labels: tuple[int, ...]
) -> None:
    loop = loop_of(bert, 2, 12, end="means")
    loop.train[1][:] = np.resize(labels, 12)
    loop.dev, loop.courses = None, (replace(loop.courses[0], dev=None),)
    list(loop.events())
    rows, numbers = loop.train
    read = compute_features(loop.tuned, rows)
    answers = compute_logits(loop.tuned, rows)
    if len(labels) == 1:
        assert set(answers.argmax(1).tolist()) == set(labels)
        return
    model = LogisticRegression(C=1.0, max_iter=1000).fit(read, numbers)
    assert answers[:, 1] - answers[:, 0] == pytest.approx(model.decision_function(read), abs=1e-2)
