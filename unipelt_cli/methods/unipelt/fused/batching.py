"""Rows of a batch shared out in groups of like length, as many as there are cores."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unipelt_cli.methods.unipelt.fused.tensors import RowGroup
from unipelt_cli.system.row_threads import lanes, shares_out

LEAST_TOKENS = 96  # fewer are not worth a lane of their own
MOST_TOKENS = 512  # of more, what a layer works on does not fit a core's own cache


def share_out(mask: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, slice]]:
    """Share rows out: (places of rows, runs). On a CPU each part is of one run, of like lengths."""
    runs = len(counts)
    if not shares_out(mask.device):
        return [(torch.arange(len(mask), device=mask.device), slice(0, runs))]
    lengths, start, parts = mask.sum(1), 0, []
    for run, count in enumerate(counts):
        rows = start + lengths[start : start + count].argsort(descending=True, stable=True)
        pieces = min(_pieces(int(lengths[rows].sum()), runs), count)
        for piece in range(pieces):  # of as many rows, and nearly as many tokens, each
            parts.append((rows[piece::pieces], slice(run, run + 1)))
        start += count
    return parts


def _pieces(tokens: int, runs: int) -> int:
    """Into how many parts a run's rows go, so that every lane gets as many."""
    multiple = lanes() // math.gcd(lanes(), runs)
    pieces = -(-max(1, tokens // MOST_TOKENS) // multiple) * multiple
    return min(pieces, max(1, tokens // LEAST_TOKENS))


def row_group(mask: Tensor, rows: Tensor, runs: slice, prefix: int, dtype: torch.dtype) -> RowGroup:
    """Describe a part of a batch with this mask (N, T): where its tokens are, what they read."""
    group_mask = mask[rows]
    lengths, width = group_mask.sum(1), mask.shape[1]
    tokens = _rounded(int(lengths.max()), 8)
    keys = _rounded(prefix + tokens, 32 if dtype.itemsize == 2 else 16)
    spread = group_mask.new_zeros(len(group_mask), max(tokens, width))
    spread[:, :width] = group_mask
    spread = spread[:, :tokens]
    bias = None
    if keys > prefix + tokens or not bool(spread.all()):
        closed = torch.finfo(dtype).min
        bias = torch.zeros(len(group_mask), 1, keys, dtype=dtype, device=mask.device)
        bias[:, 0, prefix : prefix + tokens] = (1 - spread).to(dtype) * closed
        bias[:, 0, prefix + tokens :] = closed
    grid = _travellers(spread, width)
    row_of, position = grid // tokens, grid % tokens
    source = rows[row_of] * width + position
    share = (group_mask[row_of, position] / lengths[row_of])[:, None].float()
    kept = None if len(grid) == spread.numel() else grid
    return RowGroup(rows, runs, row_of, kept, source, share, tokens, bias, keys, prefix)


def _rounded(count: int, step: int) -> int:
    """Round up, so that few shapes exist: a processor's products are prepared for each anew."""
    return -(-count // step) * step


def _travellers(spread: Tensor, width: int) -> Tensor:
    """Return the places of the tokens that go through the layers; spread: (n, T), 1 for real ones.

    Some padding goes along to round their number; not on a CPU all of it, so that runs are alike.
    """
    flat = spread[:, :width].flatten()
    places = torch.arange(spread.numel(), device=spread.device).view_as(spread)
    places = places[:, :width].flatten()
    if not shares_out(spread.device):
        return places
    real = int(flat.sum())
    count = min(_rounded(real, 32 if real > 256 else 16), len(flat))
    chosen = flat.argsort(descending=True, stable=True)[:count]
    return places[chosen.sort().values]
