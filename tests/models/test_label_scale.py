"""The scale on which a regression is learned, and a head that has it in its last unit."""

import numpy as np
import pytest
import torch
from torch import nn

from unipelt_cli.models.label_scale import RAW, LabelScale

LABELS = {
    "scores": np.linspace(16, 84, 24),
    "prices": np.linspace(105_534, 968_881, 24),
    "years": np.arange(1990.0, 2014.0),
    "temperatures": np.linspace(-61, -12, 24),
    "shares": np.linspace(1e-6, 9e-6, 24),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_standardised_labels_have_mean_0_and_deviation_1_and_come_back(labels: np.ndarray) -> None:
    scale = LabelScale.of(labels)
    standardised = scale.standardise(labels)
    assert standardised.dtype == np.float32
    assert standardised.mean() == pytest.approx(0, abs=1e-6)
    assert standardised.std() == pytest.approx(1, abs=1e-6)
    assert scale.restore(standardised) == pytest.approx(labels, abs=1e-6 * scale.unit)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_folding_moves_the_scale_into_a_unit(labels: np.ndarray) -> None:
    scale, unit = LabelScale.of(labels), nn.Linear(8, 1)
    features = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = scale.restore(unit(features).numpy())
        scale.fold_into(unit)
        assert unit(features).numpy() == pytest.approx(expected, abs=1e-4 * scale.unit)


@pytest.mark.parametrize("labels", [[0.1] * 3, [500_000.0], [0.0, 0.0]])
def test_equal_labels_are_all_that_is_said(labels: list[float]) -> None:
    scale, unit = LabelScale.of(np.array(labels)), nn.Linear(8, 1)
    assert scale == LabelScale(labels[0], 0.0)
    assert scale.standardise(np.array(labels)).tolist() == [0.0] * len(labels)
    scale.fold_into(unit)
    assert unit(torch.ones(1, 8)).item() == np.float32(labels[0])
    assert scale.unit > 0


@pytest.mark.parametrize(
    ("labels", "is_raw"),
    [
        ([0.0, 2.5, 5.0], True),  # STS-B's
        ([-1.2, 0.1, 1.1], True),
        ([1.0, 3.0, 5.5], False),
        ([0.1, 0.4, 0.9], False),
        ([2.0, 2.0, 2.0], False),
    ],
)
def test_labels_that_a_head_reaches_are_chosen_to_be_raw(labels: list[float], is_raw: bool) -> None:
    assert (LabelScale.chosen(np.array(labels)) == RAW) == is_raw


def test_raw_labels_stay_as_they_are() -> None:
    labels, unit = np.array([1.5, -2.25, 7.0]), nn.Linear(4, 1)
    before = [parameter.clone() for parameter in unit.parameters()]
    RAW.fold_into(unit)
    assert all(map(torch.equal, before, unit.parameters()))
    assert RAW.standardise(labels).tolist() == RAW.restore(labels).tolist() == labels.tolist()
    assert RAW.unit == 1.0
