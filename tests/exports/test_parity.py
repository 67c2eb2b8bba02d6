"""How an export and its run are compared."""

import torch
from torch import Tensor

from unipelt_cli.exports.parity import Parity, compare, unpadded
from unipelt_cli.exports.parity import padded as parity_padded
from unipelt_cli.models.batches import Encoded


def test_batches_hold_every_row_once_and_unpadded_ones_rows_of_one_length() -> None:
    lengths = [1 + row % 7 for row in range(256)]
    rows = Encoded([[5] * length for length in lengths], None, 0)
    for batches in (list(parity_padded(rows)), list(unpadded(rows))):
        assert sorted(row for batch in batches for row in batch) == list(range(256))
    assert all(len({lengths[row] for row in batch}) == 1 for batch in unpadded(rows))
    assert {1, 3, 32, 8} <= set(map(len, parity_padded(rows)))


def test_parity_counts_differences_and_flips() -> None:
    rows = Encoded([[1], [2, 2], [3], [4]], None, 0)

    def ours(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack([input_ids[:, 0].float(), torch.full((len(input_ids),), 2.5)], 1)

    def theirs(**batch: Tensor) -> Tensor:
        return ours(**batch) + torch.tensor([1.0, 0.0])

    assert compare(rows, parity_padded(rows), ours, theirs) == Parity(
        rows=4, max_abs_logit_diff=1.0, mean_abs_logit_diff=0.5, label_flips=1
    )
