"""Batches hold every row once, with little padding."""

from typing import Any

import numpy as np

from unipelt_cli.models.batches import by_length, shuffled


def test_an_epoch_holds_every_row_once_and_depends_on_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 103)
    batches = shuffled(lengths, 16, seed=42, epoch=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert [len(batch) for batch in sorted(batches, key=len)] == [7, 16, 16, 16, 16, 16, 16]
    again = shuffled(lengths, 16, seed=42, epoch=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    other = shuffled(lengths, 16, seed=42, epoch=2)
    assert {tuple(sorted(b)) for b in batches} != {tuple(sorted(b)) for b in other}


def test_buckets_save_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 512)

    def padded(batches: list[Any]) -> int:
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    plain = [np.arange(start, start + 16) for start in range(0, 512, 16)]
    assert padded(shuffled(lengths, 16, seed=1, epoch=1)) < 0.85 * padded(plain)


def test_evaluation_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(3, 129, 700)
    batches = list(by_length(lengths))
    assert sorted(row for batch in batches for row in batch) == list(range(700))
    assert all(len(batch) * lengths[batch].max() <= 4096 for batch in batches)
