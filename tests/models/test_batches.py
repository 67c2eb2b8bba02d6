"""Batches hold every row once, with little padding."""

from typing import Any

import numpy as np

from unipelt_cli.models.batches import balanced, by_length, interleaved, shuffled


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


def test_balanced_batches_hold_as_many_rows_of_every_class() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    batches = balanced(labels, 32, seed=42, epoch=1)
    assert [len(batch) for batch in batches] == [25, 25, 25, 25]
    for batch in batches:
        counts = np.bincount(labels[batch], minlength=3)
        assert counts.max() - counts.min() <= 1
    rows = np.concatenate(batches)
    assert set(rows[labels[rows] == 2]) == set(range(95, 100))  # all of them, several times
    frequent = rows[labels[rows] == 0]
    assert len(set(frequent)) == len(frequent)  # none twice
    assert set(frequent) != set(np.concatenate(balanced(labels, 32, seed=42, epoch=2)))
    again = balanced(labels, 32, seed=42, epoch=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_of_many_classes_a_batch_has_several_rows_each() -> None:
    labels = np.array([0] * 30 + [1] * 9 + list(range(2, 63)))  # 63 classes, most with one row
    batches = balanced(labels, 32, seed=42, epoch=1, rows_per_class=2)
    assert sum(map(len, batches)) == 100
    assert max(map(len, batches)) <= 33
    for batch in batches:
        counts = np.bincount(labels[batch])
        assert set(counts[counts > 0]) <= {2, 4}  # a turn of all classes may end in a batch
    alone = np.bincount(labels[balanced(labels, 32, 42, 1)[0]])
    assert set(alone) <= {0, 1}
    frequent = [row for batch in batches for row in batch if labels[row] == 0]
    assert len(set(frequent)) == len(frequent)


def test_few_classes_are_balanced_as_ever_and_small_batches_too() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    for size in (1, 3, 31, 32):
        pairs = balanced(labels, size, seed=42, epoch=1, rows_per_class=2)
        assert len(pairs) == -(-100 // size)
        assert sum(map(len, pairs)) == 100
        assert max(map(len, pairs)) <= size + 1
    plain = balanced(labels, 32, seed=42, epoch=1)
    pairs = balanced(labels, 32, seed=42, epoch=1, rows_per_class=2)
    assert all((a == b).all() for a, b in zip(plain, pairs, strict=True))


def test_only_tasks_with_classes_are_balanced() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 40)
    labels = np.array([0] * 30 + [1] * 10)
    batches = interleaved([lengths, lengths], 20, 42, 1, [None, labels])
    values = np.concatenate([rows for task, rows in batches if task == 0])
    assert sorted(values.tolist()) == list(range(40))
    classes = [np.bincount(labels[rows]).tolist() for task, rows in batches if task == 1]
    assert classes == [[10, 10], [10, 10]]
