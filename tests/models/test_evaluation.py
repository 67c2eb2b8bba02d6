"""What is made of logits."""

import numpy as np
import pytest

from unipelt_cli.models.evaluation import has_collapsed


@pytest.mark.parametrize(
    ("values", "collapsed"),
    [([1, 1, 1], True), ([1, 0, 1], False), ([2.5, 2.5000001, 2.5], True), ([2.5, 2.6], False)],
)
def test_a_run_has_collapsed_when_its_predictions_are_constant(
    values: list[float], collapsed: bool
) -> None:
    assert has_collapsed(np.array(values)) == collapsed


def test_small_values_collapse_in_their_own_unit() -> None:
    values = np.array([2e-8, 3e-8, 2e-8])
    assert has_collapsed(values)
    assert not has_collapsed(values, unit=1e-8)
