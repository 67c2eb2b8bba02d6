"""Attention forwards of our own, where a lengthened mask would fail or be silently wrong."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def distilbert_eager(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """Attend over prefix and tokens; the library's own takes its key length before projecting.

    query, key, value: (batch, length, hidden); mask: (batch, length), 1 for tokens.
    """
    batch, length, hidden = query.shape

    def heads(states: Tensor) -> Tensor:
        return states.view(batch, -1, attention.n_heads, hidden // attention.n_heads).transpose(
            1, 2
        )

    queries = heads(attention.q_lin(query))
    keys, values = heads(attention.k_lin(key)), heads(attention.v_lin(value))
    scores = queries @ keys.transpose(2, 3) / math.sqrt(hidden // attention.n_heads)
    attended = functional.pad(mask, (keys.shape[2] - mask.shape[1], 0), value=1)
    scores = scores.masked_fill(attended[:, None, None] == 0, torch.finfo(scores.dtype).min)
    weights = attention.dropout(scores.softmax(dim=-1))
    if head_mask is not None:
        weights = weights * head_mask
    context = (weights @ values).transpose(1, 2).reshape(batch, length, hidden)
    context = attention.out_lin(context)
    return (context, weights) if output_attentions else (context,)


OWN_ATTENTION: dict[tuple[str, str], Callable[..., tuple[Tensor, ...]]] = {
    ("distilbert", "eager"): distilbert_eager,
}


def replace_attention(module: nn.Module, model_type: str, implementation: str) -> None:
    """Give one attention module the forward that this table holds for it."""
    own = OWN_ATTENTION[model_type, implementation]
    module.forward = own.__get__(module)
