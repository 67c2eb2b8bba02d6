"""Attention forwards of our own, where a lengthened mask would fail or be silently wrong.

Each puts the prefix in by itself, so that masks and position biases are made for the tokens alone.
Shapes: batch B, tokens T, prefix length P, hidden D, heads H.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rows = Callable[[int, Tensor], Tensor]
"""The prefix's keys (0) or values (1), (B, P, D), of the kind of the projected tokens."""


def distilbert_eager(
    attention: Any,
    rows: Rows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """Attend over prefix and tokens; the library's own takes its key length before projecting.

    query, key, value: (B, T, D); mask: (B, T), 1 for tokens.
    """
    queries = _heads(attention.q_lin(query), attention.n_heads)
    keys = _heads(_prepend(rows, 0, attention.k_lin(key)), attention.n_heads)
    values = _heads(_prepend(rows, 1, attention.v_lin(value)), attention.n_heads)
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
    attended = _lengthened(mask, keys, opened=1)[:, None, None]
    scores = scores.masked_fill(attended == 0, torch.finfo(scores.dtype).min)
    context, weights = _mix(scores, values, attention.dropout, head_mask)
    context = attention.out_lin(context)
    return (context, weights) if output_attentions else (context,)


def mpnet_eager(
    attention: Any,
    rows: Rows,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    """Attend over prefix and tokens; the library's own has a bias for T positions alone.

    attention_mask: (B, 1, 1, T), added to the scores; position_bias: (B, H, T, T).
    """
    heads = attention.num_attention_heads
    queries = _heads(attention.q(hidden_states), heads)
    keys = _heads(_prepend(rows, 0, attention.k(hidden_states)), heads)
    values = _heads(_prepend(rows, 1, attention.v(hidden_states)), heads)
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + _lengthened(added, keys)
    context, weights = _mix(scores, values, attention.dropout, head_mask)
    context = attention.o(context)
    return (context, weights) if output_attentions else (context,)


def deberta_eager(
    attention: Any,
    rows: Rows,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend over prefix and tokens, which alone have positions, relative to each other.

    attention_mask: (B, 1, T, T), 1 where a token may look; rel_embeddings: (2S, D).
    """
    heads = attention.num_attention_heads
    read = hidden_states if query_states is None else query_states
    queries = _heads(attention.query_proj(read), heads)
    projected = attention.key_proj(hidden_states), attention.value_proj(hidden_states)
    keys, values = _heads(projected[0], heads), _heads(projected[1], heads)
    terms = 1 + len({"c2p", "p2c"} & set(attention.pos_att_type))
    # Rounded to float32 whatever the tokens are, as the library's own is.
    scale = torch.tensor(queries.shape[-1] * terms, dtype=torch.float32).sqrt().to(queries.dtype)
    scores = queries @ (keys.transpose(2, 3) / scale)
    if attention.relative_attention:
        bias = attention.disentangled_attention_bias(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            relative_pos,
            attention.pos_dropout(rel_embeddings),
            terms,
        )
        scores = scores + (bias.view_as(scores) if isinstance(bias, Tensor) else bias)
    before = _heads(rows(0, projected[0]), heads)
    scores = torch.cat([queries @ (before.transpose(2, 3) / scale), scores], dim=-1)
    values = torch.cat([_heads(rows(1, projected[1]), heads), values], dim=2)
    attended = _lengthened(attention_mask.to(torch.uint8), values, opened=1)
    scores = scores.masked_fill(attended == 0, torch.finfo(scores.dtype).min)
    context, weights = _mix(scores, values, attention.dropout)
    return context, weights if output_attentions else None


def t5_eager(
    attention: Any,
    rows: Rows,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    layer_head_mask: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    """Attend over prefix and tokens; the library's own would count the prefix as positions.

    mask: (B, 1, 1, T), added to the scores; position_bias: (1 or B, H, T, T), which the first
    layer makes, mask included, and hands to the others.
    """
    queries = _heads(attention.q(hidden_states), attention.n_heads)
    keys = _heads(_prepend(rows, 0, attention.k(hidden_states)), attention.n_heads)
    values = _heads(_prepend(rows, 1, attention.v(hidden_states)), attention.n_heads)
    if position_bias is None:
        length = hidden_states.shape[1]
        position_bias = attention.compute_bias(length, length, device=queries.device)
        assert position_bias is not None
        position_bias = position_bias if mask is None else position_bias + mask
    scores = queries @ keys.transpose(2, 3) + _lengthened(position_bias, keys)
    dropout = partial(functional.dropout, p=attention.dropout, training=attention.training)
    context, weights = _mix(scores.float(), values, dropout, layer_head_mask)
    context = attention.o(context)
    return (context, position_bias, weights) if output_attentions else (context, position_bias)


def modernbert(
    attention: Any,
    rows: Rows,
    hidden_states: Tensor,
    output_attentions: bool = False,
    *,
    attention_mask: Tensor,
    sliding_window_mask: Tensor,
    position_ids: Tensor,
    **_: Any,
) -> tuple[Tensor, ...]:
    """Attend over prefix and tokens, which alone are turned by their positions.

    Both masks, (B, 1, T, T), are added to the scores; every window has the prefix in it.
    """
    projected = attention.Wqkv(hidden_states)
    query, key, value = projected.chunk(3, dim=-1)
    turn = attention.rotary_emb(projected, position_ids=position_ids)
    queries = _turned(_heads(query, attention.num_heads), *turn)
    keys = _turned(_heads(key, attention.num_heads), *turn)
    keys = torch.cat([_heads(rows(0, key), attention.num_heads), keys], dim=2)
    values = _heads(_prepend(rows, 1, value), attention.num_heads)
    sees_all = attention.local_attention == (-1, -1)
    mask = _lengthened(attention_mask if sees_all else sliding_window_mask, keys)
    probability = attention.attention_dropout if attention.training else 0.0
    is_fused = attention.config._attn_implementation == "sdpa" and not output_attentions
    context, weights = _attend(queries, keys, values, mask, probability, is_fused)
    context = attention.out_drop(attention.Wo(context))
    return (context,) if weights is None or not output_attentions else (context, weights)


def bart(
    attention: Any,
    rows: Rows,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over prefix and tokens, of this stack or (key_value_states) of the encoder.

    The library's own takes its key length before projecting. attention_mask: (B, 1, T, S), added
    to the scores; without one every token is read, in a decoder every one up to the query.
    """
    read = hidden_states if key_value_states is None else key_value_states
    queries = _heads(attention.q_proj(hidden_states), attention.num_heads)
    keys = _heads(_prepend(rows, 0, attention.k_proj(read)), attention.num_heads)
    values = _heads(_prepend(rows, 1, attention.v_proj(read)), attention.num_heads)
    if attention_mask is None:
        closed = torch.finfo(queries.dtype).min if attention.is_causal else 0.0
        length = hidden_states.shape[1]
        attention_mask = queries.new_full((1, 1, length, read.shape[1]), closed).triu(1)
    mask = _lengthened(attention_mask, keys)
    probability = attention.dropout if attention.training else 0.0
    is_fused = attention.config._attn_implementation == "sdpa" and not output_attentions
    context, weights = _attend(queries, keys, values, mask, probability, is_fused)
    return attention.out_proj(context), weights


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    probability: float,
    is_fused: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend over keys (B, H, P + T, D / H); return (B, T, D), and the weights where they are."""
    if is_fused:
        context = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=probability
        )
        return context.transpose(1, 2).flatten(2), None
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1]) + mask
    return _mix(scores.float(), values, partial(functional.dropout, p=probability))


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn (B, H, T, D / H) by positions: cosine and sine are (1, T, D / H)."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]


def _prepend(rows: Rows, key_or_value: int, projected: Tensor) -> Tensor:
    """Put the prefix's rows before projected tokens: (B, T, D) -> (B, P + T, D)."""
    return torch.cat([rows(key_or_value, projected), projected], dim=1)


def _heads(projected: Tensor, heads: int) -> Tensor:  # (B, T, D) -> (B, H, T, D / H)
    width = projected.shape[-1] // heads  # a closed prefix has no rows to tell it by
    return projected.view(*projected.shape[:2], heads, width).transpose(1, 2)


def _lengthened(mask: Tensor, keys: Tensor, opened: float = 0) -> Tensor:
    """Give a mask or a bias over T keys columns for the prefix, which every token may see."""
    return functional.pad(mask, (keys.shape[-2] - mask.shape[-1], 0), value=opened)


def _mix(
    scores: Tensor,
    values: Tensor,
    dropout: Callable[[Tensor], Tensor],
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weigh values by scores (B, H, T, P + T); return (B, T, D) and the weights."""
    weights = dropout(scores.softmax(dim=-1).to(values.dtype))
    if head_mask is not None:
        weights = weights * head_mask
    return (weights @ values).transpose(1, 2).flatten(2), weights


OWN_ATTENTION: dict[tuple[str, str], Callable[..., tuple[Any, ...]]] = {
    ("distilbert", "eager"): distilbert_eager,
    ("mpnet", "eager"): mpnet_eager,
    ("deberta-v2", "eager"): deberta_eager,
    ("t5", "eager"): t5_eager,
    ("modernbert", "eager"): modernbert,
    ("modernbert", "sdpa"): modernbert,
    ("bart", "eager"): bart,
    ("bart", "sdpa"): bart,
}


def replace_attention(module: nn.Module, model_type: str, implementation: str, rows: Rows) -> None:
    """Give one attention module the forward that this table holds for it, with a prefix."""
    module.forward = partial(OWN_ATTENTION[model_type, implementation], module, rows)
