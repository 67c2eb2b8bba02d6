"""The probe: what it fits on few rows, and what it chooses without a dev row."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from unipelt_cli.methods.forms import LinearFit
from unipelt_cli.methods.partial import probe
from unipelt_cli.methods.partial.probe import Probe


def rows(count: int, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def fitted(x: torch.Tensor, y: Any, outputs: int, *, is_regression: bool = False) -> LinearFit:
    found = Probe().fit_head(x, np.asarray(y), outputs, is_regression=is_regression)
    assert found.weight.shape == (outputs, x.shape[1])
    assert found.bias.shape == (outputs,)
    assert found.weight.isfinite().all()
    return found


def answers(fit: LinearFit, x: torch.Tensor) -> NDArray[np.int64]:
    return (x @ fit.weight.T + fit.bias).argmax(1).numpy()


@pytest.mark.parametrize("outputs", [2, 3])
def test_it_gives_the_probabilities_of_the_librarys_own_model(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    monkeypatch.setattr(probe, "_CANDIDATES", ((False, (3.0,)),))
    x, y = rows(30), np.arange(30) % outputs
    fit = fitted(x, y, outputs)
    chances = torch.softmax(x @ fit.weight.T + fit.bias, dim=1).numpy()
    expected = LogisticRegression(C=3.0, max_iter=1000).fit(x.numpy(), y).predict_proba(x.numpy())
    assert np.abs(chances - expected).max() < 1e-4


def test_standardised_features_are_folded_into_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import Ridge

    monkeypatch.setattr(probe, "_CANDIDATES", ((True, (0.5,)),))
    x = rows(40) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 5.0]) + 3
    y = x[:, 0].numpy() + x[:, 1].numpy() / 10
    fit = fitted(x, y, 1, is_regression=True)
    scaled = ((x - x.mean(0)) / (x.std(0, correction=0) + probe.NARROWEST)).numpy()
    expected = Ridge(alpha=2.0).fit(scaled, y).predict(scaled)
    assert np.abs((x @ fit.weight.T + fit.bias)[:, 0].numpy() - expected).max() < 1e-4


def test_a_class_without_a_row_is_never_predicted() -> None:
    y = np.array([0, 3] * 10)
    fit = fitted(rows(20), y, 5)
    assert set(answers(fit, 100 * rows(500, seed=1)).tolist()) == {0, 3}


def test_folds_are_stratified_and_hold_every_row_out_once() -> None:
    y = np.array([0] * 50 + [1] * 10 + [2])
    held = [out for _, out in probe._folds(y)]
    assert sorted(np.concatenate(held).tolist()) == list(range(61))
    assert [np.bincount(y[out], minlength=2)[:2].tolist() for out in held] == [[10, 2]] * 5
    for kept, out in probe._folds(y):
        assert not set(kept) & set(out)


@pytest.mark.parametrize(
    ("y", "outputs"), [([0, 1], 2), ([1], 2), ([0, 0, 0, 0, 0], 3), ([0, 1, 2, 3, 4, 5, 6], 7)]
)
def test_rows_too_few_for_folds_are_fitted_all_the_same(y: list[int], outputs: int) -> None:
    x = rows(len(y))
    assert answers(fitted(x, y, outputs), x).tolist() == y


def test_few_values_are_fitted_all_the_same() -> None:
    assert fitted(rows(1), [2.5], 1, is_regression=True).bias.item() == pytest.approx(2.5)
    x = rows(2)
    fit = fitted(x, [1.0, 3.0], 1, is_regression=True)
    told = (x @ fit.weight.T + fit.bias)[:, 0]
    assert told[0] < told[1]


def test_noise_asks_for_a_stronger_penalty_than_a_clear_case() -> None:
    x, y = rows(80, 40), np.arange(80) % 2
    noise = fitted(x, y, 2).weight.norm()
    x[:, 0] = torch.from_numpy(y).float() * 2 - 1
    clear = fitted(x, y, 2).weight.norm()
    assert noise < clear / 3


def test_it_depends_on_nothing_but_the_rows() -> None:
    x, y = rows(40), np.arange(40) % 3
    first, second = fitted(x, y, 3), fitted(x, y, 3)
    assert torch.equal(first.weight, second.weight)


def test_the_strength_is_chosen_on_a_part_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MOST_ROWS", 20)
    seen: list[int] = []
    fit = probe.fit_classes

    def watched(x: Any, y: Any, strength: float, outputs: int) -> Any:
        seen.append(len(x))
        return fit(x, y, strength, outputs)

    monkeypatch.setattr(probe, "fit_classes", watched)
    fitted(rows(100), np.arange(100) % 2, 2)
    assert max(seen[:-1]) <= 20
    assert seen[-1] == 100


def test_its_solver_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads on matrices this small take many times as long as one."""
    threads: set[int] = set()
    fit = LogisticRegression.fit

    def counting(self: Any, *arguments: Any) -> Any:
        threads.update(pool["num_threads"] for pool in threadpool_info())
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", counting)
    with threadpool_limits(limits=2):
        Probe().fit_head(torch.randn(12, 4), np.arange(12) % 3, 3, is_regression=False)
        assert threads == {1}
        assert max(pool["num_threads"] for pool in threadpool_info()) == 2
