"""How rows become tensors: tokens once, then batches of rows of like length.

Submodules pool over real tokens only, so rows of any length may share a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
    """Rows as token ids; `types` tells the sentences of a pair apart where a backbone wants it."""

    ids: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]] | None
    pad_id: int
    pad_to: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Pad some rows to the longest of them: tensors (batch, length) by input name."""
        counts = np.fromiter((len(self.ids[row]) for row in rows), np.int64, len(rows))
        length = self.pad_to or int(counts.max())
        mask = np.arange(length) < counts[:, None]

        def padded(values: Sequence[Sequence[int]], value: int) -> Tensor:
            there = np.full(mask.shape, value)
            flat = chain.from_iterable(values[row] for row in rows)
            there[mask] = np.fromiter(flat, np.int64, int(counts.sum()))
            return torch.from_numpy(there)

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
) -> Encoded:
    """Tokenize one or two text columns, cut to `max_length` tokens, for a backbone's config.

    Raises BackboneError for a tokenizer that fails, gives a row no token, or one too many.
    """
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
    )


def _refuse(reason: str) -> BackboneError:
    return BackboneError(
        f"the backbone's tokenizer cannot read the rows ({reason})",
        "save it again with save_pretrained of a fast tokenizer",
    )


def interleaved(
    lengths: Sequence[NDArray[np.int64]], batch_size: int, seed: int, epoch: int
) -> list[tuple[int, NDArray[np.int64]]]:
    """Return an epoch's batches, each of one task's rows: (task, row numbers), tasks mixed.

    Every row of every task comes once, so that tasks are drawn in proportion to their sizes.
    """
    batches = [shuffled(own, batch_size, seed, epoch, task) for task, own in enumerate(lengths)]
    turns = np.repeat(np.arange(len(batches)), [len(own) for own in batches])
    np.random.default_rng([seed, epoch, len(batches)]).shuffle(turns)
    queues = [iter(own) for own in batches]
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
    return [batches[place] for place in random.permutation(len(batches))]


def by_length(lengths: NDArray[np.int64], pad_to: int | None = None) -> Iterator[list[int]]:
    """Yield batches of row numbers for evaluation: longest rows first, within a token budget."""
    batch: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        width = pad_to or (int(lengths[batch[0]]) if batch else int(lengths[row]))
        if batch and (len(batch) + 1) * width > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
