"""Attention over tokens and a gated prefix, forward and backward."""

import torch
from torch import Tensor

from unipelt_cli.methods.unipelt.fused.tensors import (
    AFTER_SOFTMAX,
    ATEN,
    Masks,
    RowGroup,
    Tensors,
    Trained,
)


def attend(
    qkv: Tensor,
    part: RowGroup,
    trained: Trained,
    gates: Tensor | None,
    heads: int,
    masks: Masks | None,
    saved: Tensors,
) -> Tensor:
    """Attend over prefix and tokens: (M, 3D) -> (M, D)."""
    n, tokens = len(part.rows), part.tokens
    query, *stored = (
        part.spread(qkv).view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )  # (n, H, T, d) each
    size = query.shape[-1]
    both = qkv.new_zeros(2, n, heads, part.keys, size)
    for key_or_value, projected in enumerate(stored):
        both[key_or_value, :, :, part.prefix : part.prefix + tokens] = projected
    has_prefix = trained.prefix is not None and "prefix" not in trained.closed
    if trained.prefix is not None and has_prefix:
        both[:, :, :, : part.prefix] = _rows(trained.prefix, n, heads, gates)
    query = torch.mul(query, size**-0.5, out=qkv.new_empty(n, heads, tokens, size)).flatten(0, 1)
    keys, values = both.flatten(1, 2)
    scores = query @ keys.mT
    if part.bias is not None:
        scores.view(n, heads, tokens, -1).add_(part.bias[:, None])
    if part.prefix and not has_prefix:
        scores[..., : part.prefix] = torch.finfo(scores.dtype).min
    weights = used = scores.softmax(-1)
    if masks is not None:
        used = masks.put(AFTER_SOFTMAX, weights.view(n, heads, tokens, -1)).view_as(weights)
        saved |= {"query": query, "keys": keys, "values": values, "weights": weights, "used": used}
    context = used @ values
    if masks is not None:
        context *= masks.scale(AFTER_SOFTMAX)
    mixed: Tensor = context.view(n, heads, tokens, size).transpose(1, 2)
    return part.gathered(mixed.reshape(n, tokens, -1))


def attend_back(
    grad: Tensor, saved: Tensors, part: RowGroup, heads: int, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the projected tokens (M, 3D) and of the prefix (2, n, H, P, d)."""
    n, tokens, hidden = len(part.rows), part.tokens, grad.shape[-1]
    size = hidden // heads
    by_head = part.spread(grad).view(n, tokens, heads, size).transpose(1, 2)
    scaled = by_head.reshape(n * heads, tokens, size) * masks.scale(AFTER_SOFTMAX)
    weights = saved["weights"]
    dropped = (scaled @ saved["values"].mT).view(n, heads, tokens, part.keys)
    dropped = masks.put(AFTER_SOFTMAX, dropped).view_as(weights)
    scores = ATEN._softmax_backward_data(dropped, weights, -1, weights.dtype)
    query = (scores @ saved["keys"]).mul_(size**-0.5)
    stored = scores.mT @ saved["query"], saved["used"].mT @ scaled  # of keys, of values
    keys, values = (gradient.view(n, heads, part.keys, size) for gradient in stored)
    first, last = part.prefix, part.prefix + tokens
    qkv = grad.new_empty(n, tokens, 3, heads, size)
    qkv[:, :, 0] = query.view(n, heads, tokens, size).transpose(1, 2)
    qkv[:, :, 1] = keys[:, :, first:last].transpose(1, 2)
    qkv[:, :, 2] = values[:, :, first:last].transpose(1, 2)
    rows = torch.stack([keys[:, :, :first], values[:, :, :first]])
    return part.gathered(qkv.view(n, tokens, 3 * hidden)), rows


def _rows(prefix: Tensor, n: int, heads: int, gates: Tensor | None) -> Tensor:
    """Return the prefix (R, 2, P, D) as every row has it: (2, n, H, P, d)."""
    runs, _, length, hidden = prefix.shape
    rows = prefix.view(runs, 1, 2, length, heads, hidden // heads)
    if gates is None:
        rows = rows.expand(-1, n // runs, -1, -1, -1, -1)
    else:
        rows = rows * gates[:, -1].view(runs, -1, 1, 1, 1, 1)
    return rows.reshape(n, 2, length, heads, -1).permute(1, 0, 3, 2, 4)


def rows_back(grad: Tensor, prefix: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the prefix (R, 2, P, D) and of its gate (n, 1)."""
    runs = len(prefix)
    by_run = grad.permute(1, 0, 3, 2, 4).float().reshape(runs, grad.shape[1] // runs, -1)
    if gates is None:
        return by_run.sum(1).view_as(prefix), None
    gate = gates[:, -1].view(runs, 1, -1)
    flat = prefix.reshape(runs, -1, 1)
    return (gate @ by_run).view_as(prefix), (by_run @ flat).view(-1, 1)
