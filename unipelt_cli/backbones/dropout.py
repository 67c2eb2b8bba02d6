"""Dropout whose masks depend on a seed, the row, the position and the place in the model alone.

They do not depend on how far a batch is padded, on how it is split over cores, or on the device.
A mask is computed from counters, which costs an eighth of drawing numbers one by one on a CPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

CPU = torch.device("cpu")
_LEVELS = 2**15  # a mask decides on 15 random bits
_MIXERS = (0x7FEB352D, -0x7B935975)  # odd; multiplying by them spreads every bit upwards
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class DropoutKeys:
    """What one dropout's mask is computed from: a word for each row, one (of each row) for columns.

    rows: (N,) int32; columns: (N,) or (1,) int32.
    """

    rows: Tensor
    columns: Tensor

    def take(self, rows: Tensor) -> "DropoutKeys":
        """Return the keys of some rows."""
        return DropoutKeys(
            self.rows[rows], self.columns if len(self.columns) == 1 else self.columns[rows]
        )


class DropoutSource:
    """Where the dropouts of one model take their keys, one after the other.

    By itself it draws from the global generator: see `of` for several runs.
    """

    def __init__(self) -> None:
        self._generators: Sequence[Generator] = ()
        self._runs = self._places = torch.zeros(0, dtype=torch.long)

    @contextmanager
    def of(self, generators: Sequence[Generator], counts: Sequence[int]) -> Iterator[None]:
        """Inside, a batch holds so many rows of each run, and each run draws for itself."""
        before = self._generators, self._runs, self._places
        self._generators = generators
        self._runs = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self._places = torch.cat([torch.arange(count) for count in counts])
        try:
            yield
        finally:
            self._generators, self._runs, self._places = before

    def next(self, rows: int) -> DropoutKeys:
        """Draw the keys of the next mask, for a batch of so many rows."""
        if not self._generators:
            drawn = _draw(None)
            return DropoutKeys(_mixed(_words(rows) ^ drawn[0]), drawn[1:])
        assert rows == len(self._runs)
        drawn = torch.stack([_draw(generator) for generator in self._generators])[self._runs]
        words = _words(int(self._places.max()) + 1)[self._places]
        return DropoutKeys(_mixed(words ^ drawn[:, 0]), drawn[:, 1])


def _draw(generator: Generator | None) -> Tensor:
    return torch.randint(-(2**31), 2**31, (2,), generator=generator).to(torch.int32)


@lru_cache(maxsize=64)
def _words(count: int, device: torch.device = CPU) -> Tensor:
    """Return fixed words, all different and without a pattern; a longer list begins alike."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, count, dtype=np.int64)
    return torch.from_numpy(words.astype(np.int32)).to(device)


def _mixed(words: Tensor) -> Tensor:
    """Spread the bits of int32 words, in place."""
    for factor in _MIXERS:
        words *= factor
        words ^= words >> 15
    return words


def keep_mask(
    keys: DropoutKeys,
    shape: Sequence[int],
    threshold: int,
    device: torch.device,
    chosen: Tensor | None = None,
) -> Tensor:
    """Return int16 of a shape (N, ..., C): all bits where a number is kept, none where dropped.

    `threshold` of 2^15 numbers are dropped. A larger shape's mask begins with a smaller one's.
    With places chosen among the N x ... x ones, the mask is (places, C).
    """
    words = keys.rows.to(device)
    for size in shape[1:-1]:
        words = _mixed(words[..., None] ^ (_words(size, device) * _MIXERS[1]))
    columns = _words(-(-shape[-1] // 2), device) ^ keys.columns.to(device)[:, None]
    columns = _mixed(columns).bitwise_or_(1)
    if chosen is not None:
        words = words.view(-1)[chosen]
        if len(columns) > 1:
            columns = columns[chosen // math.prod(shape[1:-1])]
    else:
        columns = columns.view(len(columns), *[1] * (len(shape) - 2), -1)
    products = words[..., None].bitwise_or(1) * columns
    products ^= products >> 16
    bits = products.view(torch.int16)[..., : shape[-1]]
    bits &= _LEVELS - 1
    return bits.neg_().add_(threshold - 1).__irshift__(15)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x where the mask keeps it, and 0 elsewhere; nothing is scaled."""
    kind = _INTEGERS[x.element_size()]
    return (x.view(kind) & mask.to(kind)).view(x.dtype)


class Dropout(nn.Module):
    """Dropout of the library's kind, with masks of our own."""

    def __init__(self, p: float, draws: DropoutSource) -> None:
        super().__init__()
        self.p, self.draws = p, draws
        self.threshold = round(p * _LEVELS)
        self.scale = _LEVELS / max(1, _LEVELS - self.threshold)

    def forward(self, x: Tensor) -> Tensor:  # any shape, rows first
        if not self.training or self.threshold == 0:
            return x
        drop: Any = _Dropped.apply
        dropped: Tensor = drop(x, self.mask(self.draws.next(len(x)), x.shape, x.device))
        return dropped * self.scale

    def mask(
        self,
        keys: DropoutKeys,
        shape: Sequence[int],
        device: torch.device,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Return the mask of a shape (N, ..., C), or of chosen places of it: see `keep_mask`."""
        return keep_mask(keys, shape, self.threshold, device, chosen)


class _Dropped(torch.autograd.Function):
    """Put the mask on a tensor, and on its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return masked(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return masked(grad, ctx.saved_tensors[0]), None


def replace_dropout(module: nn.Module, draws: DropoutSource) -> None:
    """Put dropout that draws from counters in the place of the library's, at any depth."""
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, Dropout(child.p, draws))
        else:
            replace_dropout(child, draws)
