"""Scaled dot-product attention."""

from __future__ import annotations

from fxfusion.axes import Constant
from fxfusion.rules.context import Context, Typed
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
