"""How rows become tensors: tokens once, then batches of rows of like length.

Submodules pool over real tokens only, so rows of any length may share a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipelt_cli.errors import BackboneError
from unipelt_cli.system import imports

TOKEN_BUDGET = 4096  # tokens of an evaluation batch, padding included
WINDOW = 4  # batches whose rows are sorted by length together in training


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids; `types` tells the sentences of a pair apart where a backbone wants it.

    A row may have several `texts`, each read by itself: the first of all rows, then the second.
    """

    ids: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]] | None
    pad_id: int
    pad_to: int | None = None
    texts: int = 1

    def __len__(self) -> int:
        return len(self.ids) // self.texts

    @property
    def text_lengths(self) -> NDArray[np.int64]:
        """The tokens of each text, (texts, rows)."""
        counts = np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))
        return counts.reshape(self.texts, -1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each row, those of all its texts."""
        lengths: NDArray[np.int64] = self.text_lengths.sum(0)
        return lengths

    @property
    def widths(self) -> NDArray[np.int64]:
        """What each row takes of a batch by itself: all its texts are as long as the longest."""
        widths: NDArray[np.int64] = self.texts * self.text_lengths.max(0)
        return widths

    @property
    def width_to(self) -> int | None:
        """What each row takes of a batch where all are padded alike."""
        return self.pad_to and self.texts * self.pad_to

    @property
    def each_text(self) -> "Encoded":
        """The texts as rows of their own, all first ones first."""
        return replace(self, texts=1)

    def select(self, rows: Sequence[int]) -> "Encoded":
        """Return some rows."""
        chosen = self._texts_of(rows)
        types = None if self.types is None else [self.types[text] for text in chosen]
        return replace(self, ids=[self.ids[text] for text in chosen], types=types)

    def with_rows(self, other: "Encoded") -> "Encoded":
        """Return these rows and others with as many texts after them."""
        both, kept = (self, other), self.types is not None and other.types is not None
        ids = [ids for text in range(self.texts) for rows in both for ids in rows._text(text)[0]]
        types = [
            row_types
            for text in range(self.texts)
            for rows in both
            for row_types in rows._text(text)[1]
        ]
        return replace(self, ids=ids, types=types if kept else None)

    def _text(self, text: int) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
        """Return the ids and the types of the rows' first texts, or of their second ones."""
        part = slice(text * len(self), (text + 1) * len(self))
        return self.ids[part], self.types[part] if self.types is not None else ()

    def _texts_of(self, rows: Sequence[int]) -> list[int]:
        """Return the places of some rows' texts, all first ones first."""
        return [text * len(self) + row for text in range(self.texts) for row in rows]

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Pad some rows to the longest of them: tensors (texts * batch, length) by input name."""
        rows = self._texts_of(rows) if self.texts > 1 else rows
        counts = np.fromiter((len(self.ids[row]) for row in rows), np.int64, len(rows))
        length = self.pad_to or int(counts.max())
        mask = np.arange(length) < counts[:, None]

        def padded(values: Sequence[Sequence[int]], value: int) -> Tensor:
            padded = np.full(mask.shape, value)
            flat = chain.from_iterable(values[row] for row in rows)
            padded[mask] = np.fromiter(flat, np.int64, int(counts.sum()))
            return torch.from_numpy(padded)

        ids, real = padded(self.ids, self.pad_id), torch.from_numpy(mask.astype(np.int64))
        inputs = {"input_ids": ids, "attention_mask": real}
        if self.types is not None:
            inputs["token_type_ids"] = padded(self.types, 0)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def encode(
    columns: Sequence[Sequence[str]],
    tokenizer: Any,
    config: Any,
    *,
    max_length: int,
    pad_to_max: bool = False,
    apart: bool = False,
) -> Encoded:
    """Tokenize one or two text columns, cut to `max_length` tokens, for a backbone's config.

    Two columns are one row of tokens; with `apart` each of their texts is one, cut by itself.

    Raises BackboneError for a tokenizer that fails, gives a row no token, or one too many.
    """
    texts = len(columns) if apart else 1
    if texts > 1:
        columns = [[text for column in columns for text in column]]
    with imports.guarded(_refuse):
        tokens = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    for ids in tokens["input_ids"]:
        if not 0 < len(ids) <= max_length or max(ids) >= config.vocab_size:
            numbers = f", numbered up to {max(ids)} of {config.vocab_size}" if ids else ""
            raise _refuse(f"a row has {len(ids)} tokens{numbers}")
    wants_types = getattr(config, "type_vocab_size", 0) > 1
    pad_id = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return Encoded(
        tokens["input_ids"],
        tokens["token_type_ids"] if wants_types and "token_type_ids" in tokens else None,
        pad_id,
        max_length if pad_to_max else None,
        texts,
    )


def _refuse(reason: str) -> BackboneError:
    return BackboneError(
        f"the backbone's tokenizer cannot read the rows ({reason})",
        "save it again with save_pretrained of a fast tokenizer",
    )


def interleaved(
    lengths: Sequence[NDArray[np.int64]],
    batch_size: int,
    seed: int,
    epoch: int,
    classes: Sequence[NDArray[np.int64] | None] = (),
    rows_per_class: int = 1,
) -> list[tuple[int, NDArray[np.int64]]]:
    """Return an epoch's batches, each of one task's rows: (task, row numbers), tasks mixed.

    Every row of every task comes once, so that tasks are drawn in proportion to their sizes; of
    tasks whose rows' `classes` are given, as many rows, balanced over classes.
    """
    batches = [
        shuffled(of_task, batch_size, seed, epoch, task)
        if labels is None
        else balanced(labels, batch_size, seed, epoch, task, rows_per_class)
        for task, (of_task, labels) in enumerate(zip_longest(lengths, classes))
    ]
    turns = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    np.random.default_rng([seed, epoch, len(batches)]).shuffle(turns)
    queues = [iter(of_task) for of_task in batches]
    return [(task, next(queues[task])) for task in turns.tolist()]


def shuffled(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int, task: int = 0
) -> list[NDArray[np.int64]]:
    """Return an epoch's batches of row numbers: shuffled, sorted inside windows, shuffled again.

    The order depends on seed, epoch and task alone, so that a run can go on in its middle.
    """
    random = np.random.default_rng([seed, epoch, task] if task else [seed, epoch])
    order = random.permutation(len(lengths))
    window = WINDOW * batch_size
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    batches = [
        part[np.argsort(lengths[part], kind="stable")][start : start + batch_size]
        for part in parts
        for start in range(0, len(part), batch_size)
    ]
    return [batches[index] for index in random.permutation(len(batches))]


def balanced(
    labels: NDArray[np.int64],
    batch_size: int,
    seed: int,
    epoch: int,
    task: int = 0,
    rows_per_class: int = 1,
) -> list[NDArray[np.int64]]:
    """Return an epoch's batches of row numbers: alike in size, and each of all classes alike.

    Where a batch is too small for `rows_per_class` rows of all classes, it has so many of some of
    them, and other classes follow. Rows of rare classes come several times, also in one batch, and
    of frequent ones other rows in every epoch. As in `shuffled` seed, epoch and task alone decide.
    """
    random = np.random.default_rng([seed, epoch, task, len(labels)])
    queues: dict[int, list[int]] = {label: [] for label in np.unique(labels).tolist()}
    order = random.permutation(list(queues)).tolist()  # one, so that no batch has two more of any
    count = -(-len(labels) // batch_size)
    is_too_small = len(queues) * rows_per_class > len(labels) // count
    size = rows_per_class if is_too_small and rows_per_class <= batch_size else 1
    rows: list[int] = []
    while len(rows) < len(labels):
        for label in np.repeat(order, size).tolist():
            if not queues[label]:
                queues[label] = random.permutation(np.flatnonzero(labels == label)).tolist()
            rows.append(queues[label].pop())
    # Rows of one class stay together; a batch may be larger for it by less than `rows_per_class`.
    groups = np.array_split(np.arange(-(-len(labels) // size)), count)
    ends = [size * (int(group[-1]) + 1) for group in groups[:-1]]
    return np.split(np.array(rows[: len(labels)], dtype=np.int64), ends)


def by_length(widths: NDArray[np.int64], width_to: int | None = None) -> Iterator[list[int]]:
    """Yield batches of row numbers for evaluation: widest rows first, within a token budget."""
    batch: list[int] = []
    for row in np.argsort(-widths, kind="stable").tolist():
        width = width_to or (int(widths[batch[0]]) if batch else int(widths[row]))
        if batch and (len(batch) + 1) * width > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
