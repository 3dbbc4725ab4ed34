"""Scaled dot-product attention, and the fused operators that torch.nn.MultiheadAttention calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.contract import linear
from fxfusion.rules.norm import layer_norm
from fxfusion.rules.registry import rule


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
    context: Context,
    query: Typed,
    key: Typed,
    value: Typed,
    mask: Typed | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Typed:
    """``softmax(query @ key.T + mask) @ value``; with grouped queries, heads are (key heads, group)."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = _repeat_heads(context, query, key), _repeat_heads(context, query, value)
    scores = context.broadcast(context.einsum("... l d, ... s d -> ... l s", query, key), mask)
    if is_causal:
        context.fix(scores.axes[-2], scores.axes[-1], message="a causal mask orders it")
        scores = Typed((*scores.axes[:-2], *context.fixed_like(scores.shape[-2:])))
    context.mix(scores.axes[:-1], scores.axes[-1:])
    return context.einsum("... l s, ... s e -> ... l e", scores, value)


def _repeat_heads(context: Context, query: Typed, x: Typed) -> Typed:
    heads = context.flatten([x.axes[-3], Constant(query.shape[-3] // x.shape[-3])])
    return Typed((*x.axes[:-3], heads, *x.axes[-2:]))


@rule("_native_multi_head_attention")
def multi_head_attention(
    context: Context,
    query: Typed,
    key: Typed,
    value: Typed,
    width: int,
    heads: int,
    packed_weight: Typed,
    packed_bias: Typed,
    weight: Typed,
    bias: Typed,
    mask: Typed | None = None,
    *_: Any,
) -> Sequence[Typed]:
    """Packed projections, attention, a projection; and the attention weights, heads averaged or not."""
    projected = []
    for place, x in enumerate((query, key, value)):
        rows = slice(place * width, (place + 1) * width)
        part = linear(context, x, _rows(context, packed_weight, rows), _rows(context, packed_bias, rows))
        split = context.regroup([part.axes[-1]], [heads, width // heads])
        projected.append(Typed((part.axes[0], split[0], part.axes[1], split[1])))
    if mask is not None:
        context.fix(*mask.axes, *query.axes[:2], *key.axes[:2], *value.axes[:2], message="a mask orders it")
    attended = scaled_dot_product_attention(context, projected[0], projected[1], projected[2])
    joined = context.flatten([attended.axes[1], attended.axes[3]])
    result = linear(context, Typed((attended.axes[0], attended.axes[2], joined)), weight, bias)
    scores = [attended.axes[0], attended.axes[1], query.axes[1], key.axes[1]]
    wanted = {0: [], 3: [scores[0], *scores[2:]], 4: scores}[len(context.shapes[-1])]  # none, averaged, all
    return [result, Typed(tuple(wanted))]


def _rows(context: Context, x: Typed, rows: slice) -> Typed:
    return Typed(tuple(context.narrow(x, 0, rows.start, rows.stop)), origins=x.origins)


@rule("_transformer_encoder_layer_fwd")
def encoder_layer(
    context: Context,
    x: Typed,
    width: int,
    heads: int,
    packed_weight: Typed,
    packed_bias: Typed,
    weight: Typed,
    bias: Typed,
    gelu: bool,
    norm_first: bool,
    epsilon: float,
    *more: Any,
) -> Typed:
    """``x + attention(x)``, then ``x + feed_forward(x)``, with a layer norm before or after each."""
    scale1, shift1, scale2, shift2, up, up_bias, down, down_bias, *masks = more
    attention = (width, heads, packed_weight, packed_bias, weight, bias, masks[0] if masks else None)

    def norm(y: Typed, scale: Typed, shift: Typed) -> Typed:
        return layer_norm(context, y, [width], scale, shift)

    inner = norm(x, scale1, shift1) if norm_first else x
    x = context.broadcast(x, multi_head_attention(context, inner, inner, inner, *attention)[0])
    x = x if norm_first else norm(x, scale1, shift1)
    inner = norm(x, scale2, shift2) if norm_first else x
    x = context.broadcast(x, linear(context, linear(context, inner, up, up_bias), down, down_bias))
    return x if norm_first else norm(x, scale2, shift2)
