"""The loop: events, seeds, rates, the best epoch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unipelt_cli.backbones.dropout import Dropout
from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import CheckError
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_logits, encode_rows, predictions
from unipelt_cli.tasks import Task, get_task
from unipelt_cli.training.events import Epoch, Step
from unipelt_cli.training.loop import Training

SENTENCES = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(20)]
LABELS = np.array([i % 2 for i in range(20)])


def training(
    directory: Path, *, task: Task | None = None, labels: Any = LABELS, **train: Any
) -> Training:
    settings = resolve(
        [
            (
                "",
                {
                    "data": {"task": "sst2"},
                    "model": {"backbone": str(directory), "pooling": "cls"},
                    "method": {"name": train.pop("method", "unipelt-apl")},
                    "train": {"device": "cpu", "precision": "fp32", "batch_size": 4, **train},
                },
            )
        ]
    )
    task = task or get_task("sst2")
    tuned = build(settings, task.outputs)
    rows = encode_rows(tuned, [SENTENCES], 128)
    return Training(tuned, task, (rows, labels), (rows, labels), settings.train)


def tensors(loop: Training) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loop.parameters.items()}


def test_events_come_in_order(bert: Path) -> None:
    events = list(training(bert, epochs=2).events())
    kinds = [(type(e).__name__, e.epoch) for e in events]
    assert kinds == [("Step", 1)] * 5 + [("Epoch", 1)] + [("Step", 2)] * 5 + [("Epoch", 2)]
    assert [e.step for e in events if isinstance(e, Step)] == [1, 2, 3, 4, 5] * 2
    epoch = next(e for e in events if isinstance(e, Epoch))
    assert epoch.is_best
    assert epoch.tokens > 100
    assert epoch.dev.keys() == {"accuracy"}
    steps = [e.loss for e in events if isinstance(e, Step) and e.epoch == 1]
    assert math.isclose(epoch.train_loss, sum(steps) / 5, rel_tol=1e-6)


@pytest.mark.parametrize("method", ["unipelt-apl", "full"])
def test_a_learnable_task_is_learnt(calm_bert: Path, method: str) -> None:
    rate = {"unipelt-apl": 5e-3, "full": 3e-3}[method]
    loop = training(calm_bert, epochs=30, patience=30, learning_rate=rate, method=method)
    losses = [event.train_loss for event in loop.events() if isinstance(event, Epoch)]
    assert losses[-1] < losses[0] / 2
    assert loop.progress.best_score == 1.0


def test_the_best_epoch_is_put_back_and_patience_ends_the_run(bert: Path) -> None:
    loop = training(bert, epochs=50, patience=3, learning_rate=5e-3)
    epochs = [event for event in loop.events() if isinstance(event, Epoch)]
    best = loop.progress.best_epoch
    assert len(epochs) == best + 3 < 50
    scores = [event.dev["accuracy"] for event in epochs]
    assert scores.index(max(scores)) + 1 == best, "a tie must not count as better"
    assert [event.epoch for event in epochs if event.is_best][-1] == best
    rows, labels = loop.dev
    found = predictions(loop.task, compute_logits(loop.tuned, rows))
    assert loop.task.score(found, labels) == loop.progress.best_dev


def test_same_seed_same_tensors_whatever_ran_before(bert: Path) -> None:
    first = training(bert, epochs=2)
    list(first.events())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    second = training(bert, epochs=2)
    for _ in second.events():
        pass
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(first).values(), tensors(second).values(), strict=True)
    )
    other = training(bert, epochs=2, seed=43)
    list(other.events())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(tensors(first).values(), tensors(other).values(), strict=True)
    )


@pytest.mark.parametrize("stop_after", [1, 5, 6, 9])
def test_a_restored_state_goes_on_bit_for_bit(bert: Path, stop_after: int) -> None:
    whole = training(bert, epochs=3)
    expected = [event for event in whole.events() if isinstance(event, Step)]
    stopped = training(bert, epochs=3)
    events = stopped.events()
    seen = [next(events) for _ in range(stop_after)]
    saved, counters = stopped.state()
    saved = {name: tensor.clone() for name, tensor in saved.items()}
    resumed = training(bert, epochs=3)
    resumed.restore(saved, counters)
    rest = [event for event in resumed.events() if isinstance(event, Step)]
    steps = [event for event in seen if isinstance(event, Step)]
    assert [e.loss for e in steps + rest] == [e.loss for e in expected]
    assert resumed.progress.best_dev == whole.progress.best_dev
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(whole).values(), tensors(resumed).values(), strict=True)
    )


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy(bert: Path) -> None:
    loop = training(bert, epochs=1, labels=np.full(20, np.nan), task=get_task("stsb"))
    with pytest.raises(CheckError, match="the loss is nan at step 1") as caught:
        list(loop.events())
    assert caught.value.hint == "lower train.learning_rate (now 0.0003)"
    assert caught.value.exit_code == 1


def test_regression_trains_on_squared_error(calm_bert: Path) -> None:
    values = np.array([5.0 if i % 2 else 1.0 for i in range(20)])
    task = get_task("stsb")
    loop = training(calm_bert, epochs=40, patience=40, labels=values, task=task, learning_rate=2e-2)
    losses = [event.train_loss for event in loop.events() if isinstance(event, Epoch)]
    assert losses[-1] < losses[0] / 4
    assert loop.progress.best_dev["spearman"] > 0.8


def test_the_rate_warms_up_and_decays_to_nothing(bert: Path) -> None:
    loop = training(bert, epochs=4, warmup=0.25, learning_rate=1.0)
    rates = []
    for taken in range(21):
        loop.progress.stage_taken = taken
        rates.append(loop.stepper.rate())
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[-1] == 0.0
    assert np.diff(rates[5:]) == pytest.approx(-1 / 15)


def test_decay_leaves_biases_and_gates_of_one_dimension_alone(bert: Path) -> None:
    loop = training(bert, weight_decay=0.1)
    decayed = {
        id(p) for g in loop.stepper.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    names = {name for name, p in loop.parameters.items() if id(p) in decayed}
    assert "head.out.weight" in names
    assert not any(name.endswith("bias") or ".gates." in name for name in names)


def test_a_model_has_no_dropout_but_our_own(bert: Path) -> None:
    modules = list(training(bert).tuned.classifier.modules())
    assert any(isinstance(module, Dropout) for module in modules)
    assert not any(isinstance(module, torch.nn.Dropout) for module in modules)


def test_patience_can_be_asked_for_in_steps(bert: Path) -> None:
    loop = training(bert, epochs=50, patience=3, patience_steps=23, learning_rate=5e-3)
    epochs = [event for event in loop.events() if isinstance(event, Epoch)]
    assert len(epochs) == loop.progress.best_epoch + 5, "23 steps are more than 4 epochs of 5"


def test_the_head_can_have_a_rate_of_its_own(bert: Path) -> None:
    moved = []
    for factor in (1.0, 1e-6):
        ends = {"head_start": "random", "head_end": "trained"}
        loop = training(bert, epochs=1, head_rate=factor, **ends)
        before = tensors(loop)
        list(loop.events())
        changed = {n: (t - before[n]).abs().max() for n, t in tensors(loop).items()}
        moved.append(changed["head.out.weight"])
        assert max(changed.values()) > 1e-5
    assert moved[1] < moved[0] * 1e-5


def test_a_running_mean_is_scored_kept_and_gone_on_with(bert: Path) -> None:
    settings = {"epochs": 4, "patience": 4, "averaging": 0.5, "learning_rate": 5e-3}
    loop, saved = training(bert, **settings), None
    mean: dict[str, torch.Tensor] = {}
    for event in loop.events():
        now = tensors(loop)
        if isinstance(event, Step):
            taken = loop.progress.taken
            weight = max(0.5, 1 / taken)
            mean = {n: torch.lerp(mean[n], t, weight) if mean else t for n, t in now.items()}
        elif event.is_best:
            best = {n: t.clone() for n, t in mean.items()}
        if isinstance(event, Step) and (event.epoch, event.step) == (3, 2):
            state, counters = loop.state()
            saved = {n: t.clone() for n, t in state.items()}, counters
    assert all(torch.allclose(t, best[n], atol=1e-6) for n, t in tensors(loop).items())
    assert saved is not None
    again = training(bert, **settings)
    again.restore(*saved)
    list(again.events())
    assert all(torch.equal(t, tensors(loop)[n]) for n, t in tensors(again).items())
