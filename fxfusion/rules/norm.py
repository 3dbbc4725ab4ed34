"""Normalisations: statistics over some axes, then an element-wise scale and shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Axis, Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule


@rule("layer_norm", "rms_norm")
def layer_norm(
    context: Context,
    x: Typed,
    shape: Sequence[int],
    weight: Typed | None = None,
    bias: Typed | None = None,
    *_: Any,
) -> Typed:
    """Normalise over the last ``len(shape)`` axes, which scale and shift share."""
    first = x.rank - len(shape)
    context.mix(x.axes[:first], x.axes[first:])
    return context.broadcast(x, weight, bias if isinstance(bias, Typed) else None)


@rule("native_layer_norm", "_fused_rms_norm")
def native_layer_norm(
    context: Context,
    x: Typed,
    shape: Sequence[int],
    weight: Typed | None = None,
    bias: Typed | None = None,
    *_: Any,
) -> Sequence[Typed]:
    """Layer normalisation that also returns its statistics."""
    result = layer_norm(context, x, shape, weight, bias)
    first = x.rank - len(shape)
    statistic = Typed((*x.axes[:first], *[Constant(1)] * len(shape)))
    return [result, *[statistic] * (len(context.shapes) - 1)]


def _channelwise(context: Context, x: Typed, *vectors: Typed | None) -> Axis:
    """Unify per-channel vectors with axis 1."""
    channels = x.axes[1]
    for vector in vectors:
        if vector is not None:
            channels = context.unify(channels, vector.axes[0])
            context.kept(vector)
    return channels


def _with_channels(x: Typed, channels: Axis) -> Typed:
    return Typed((x.axes[0], channels, *x.axes[2:]))


@rule("batch_norm")
def batch_norm(
    context: Context,
    x: Typed,
    weight: Typed | None,
    bias: Typed | None,
    mean: Typed | None,
    variance: Typed | None,
    *_: Any,
) -> Typed:
    """Scale and shift by stored statistics per channel."""
    return _with_channels(x, _channelwise(context, x, weight, bias, mean, variance))


@rule("_native_batch_norm_legit_no_training")
def batch_norm_no_training(
    context: Context,
    x: Typed,
    weight: Typed | None,
    bias: Typed | None,
    mean: Typed,
    variance: Typed,
    *_: Any,
) -> Sequence[Typed]:
    """Batch normalisation in evaluation; the saved statistics it returns are empty."""
    result = batch_norm(context, x, weight, bias, mean, variance)
    return [result, *(Typed(tuple(context.fixed_like(shape))) for shape in context.shapes[1:])]


@rule("_native_batch_norm_legit")
def batch_norm_of_its_own(
    context: Context, x: Typed, weight: Typed | None = None, bias: Typed | None = None, *more: Any
) -> Sequence[Typed]:
    """Normalise every channel by its own statistics (weight standardisation), and return these, too."""
    channels = _channelwise(context, x, weight, bias, *(item for item in more if isinstance(item, Typed)))
    context.mix([channels], [x.axes[0], *x.axes[2:]])
    statistic = Typed((channels,))
    return [_with_channels(x, channels), *[statistic] * (len(context.shapes) - 1)]


@rule("group_norm")
def group_norm(
    context: Context, x: Typed, groups: int, weight: Typed | None = None, bias: Typed | None = None, *_: Any
) -> Typed:
    """Normalise over each of ``groups`` equal blocks of channels and all positions."""
    channels = _channelwise(context, x, weight, bias)
    group, inner = context.regroup([channels], [groups, channels.size // groups])
    context.mix([x.axes[0], group], [inner, *x.axes[2:]])
    return _with_channels(x, context.flatten([group, inner]))


@rule("instance_norm")
def instance_norm(
    context: Context,
    x: Typed,
    weight: Typed | None = None,
    bias: Typed | None = None,
    mean: Typed | None = None,
    variance: Typed | None = None,
    *_: Any,
) -> Typed:
    """Normalise every channel over its positions."""
    channels = _channelwise(context, x, weight, bias, mean, variance)
    context.mix([x.axes[0], channels], x.axes[2:])
    return _with_channels(x, channels)
