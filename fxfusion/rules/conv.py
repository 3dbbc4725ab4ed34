"""Convolutions and pooling: channels contract, spatial axes and kernel taps have positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Axis
from fxfusion.rules.context import Context, Typed, Use
from fxfusion.rules.registry import rule

_SPATIAL = "the operator looks at neighbouring positions"


def _spatial(context: Context, x: Typed, first: int, pointwise: bool = False) -> list[Axis]:
    """Return the output's spatial axes: the input's own under a pointwise kernel, else new fixed ones."""
    if pointwise:
        return list(x.axes[first:])
    context.fix(*x.axes[first:], message=_SPATIAL)
    return context.fixed_like(context.shapes[0][first:])


def _channels(
    context: Context, x: Axis, weight: Typed, reads: int, writes: int, groups: int
) -> tuple[Axis, Axis]:
    """Contract channels ``groups * i`` of the input with the weight; return input and output channels."""
    if groups == 1:
        # Axes in their own order, so that it stays known which one writes and which one reads.
        matrix = Typed(weight.axes[:2], weight.parameter, weight.origins)
        result = context.einsum("i, o i -> o" if writes == 0 else "i, i o -> o", Typed((x,)), matrix)
        return x, result.axes[0]
    outputs, inputs = weight.axes[writes], weight.axes[reads]
    if writes == 0:  # weight [groups * o, i]
        group, inner = context.regroup([outputs], [groups, outputs.size // groups])
    else:  # transposed: weight [groups * i, o]
        group, inner = context.regroup([inputs], [groups, inputs.size // groups])
        inputs, inner = inner, outputs
    split = context.regroup([x], [groups, x.size // groups])
    group = context.unify(split[0], group)
    context.unify(split[1], inputs)
    context.mix([group, inner], [inputs])
    context.kept(weight, [writes])
    if inputs.size > 1:
        _contracted(context, weight, reads)
    return x, context.flatten([group, inner])


def _contracted(context: Context, weight: Typed, axis: int) -> None:
    context.records.uses.append(Use(weight, axis, contracted=True))


@rule("conv1d", "conv2d", "conv3d", "convolution")
def conv(
    context: Context,
    x: Typed,
    weight: Typed,
    bias: Typed | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    *more: Any,
) -> Typed:
    """``x [b, g*i, ...]``, ``weight [g*o, i, taps...]`` -> ``[b, g*o, ...]``; one group or many."""
    if more:  # aten.convolution(x, weight, bias, stride, padding, dilation, transposed, padding, groups)
        return _convolution(context, x, weight, bias, stride, padding, bool(groups), more[-1])
    return _convolution(context, x, weight, bias, stride, padding, False, groups)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    context: Context,
    x: Typed,
    weight: Typed,
    bias: Typed | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Typed:
    """``x [b, g*i, ...]``, ``weight [g*i, o, taps...]`` -> ``[b, g*o, ...]``."""
    return _convolution(context, x, weight, bias, stride, padding, True, groups)


def _convolution(
    context: Context,
    x: Typed,
    weight: Typed,
    bias: Typed | None,
    stride: Any,
    padding: Any,
    transposed: bool,
    groups: int,
) -> Typed:
    spatial = weight.rank - 2
    channel = x.rank - spatial - 1  # an input without a batch axis is allowed
    pointwise = (
        all(size == 1 for size in weight.shape[2:])
        and _everywhere(stride, 1)
        and (_everywhere(padding, 0) or padding in ("same", "valid"))
        and x.shape[channel + 1 :] == context.shapes[0][channel + 1 :]
    )
    context.fix(*weight.axes[2:], message="kernel taps are positions")
    writes, reads = (1, 0) if transposed else (0, 1)
    _, channels = _channels(context, x.axes[channel], weight, reads, writes, groups)
    if bias is not None:
        channels = context.unify(channels, bias.axes[0])
        context.kept(bias)
    return Typed((*x.axes[:channel], channels, *_spatial(context, x, channel + 1, pointwise)))


def _everywhere(value: Any, wanted: int) -> bool:
    return all(item == wanted for item in ([value] if isinstance(value, (int, str)) else value))


def _pool(context: Context, x: Typed, spatial: int, window: Any = None) -> Typed:
    """Pool the last axes; along an axis of which a window sees one position only, units stay as they are."""
    first = x.rank - spatial
    sizes = [window] * spatial if isinstance(window, int) else list(window or [None] * spatial)
    sizes = sizes * spatial if len(sizes) == 1 else sizes
    axes = list(x.axes[:first])
    for axis, kept, size in zip(x.axes[first:], context.shapes[0][first:], sizes, strict=True):
        if size == 1 and axis.size == kept:
            axes.append(axis)
        else:
            context.fix(axis, message=_SPATIAL)
            axes.append(context.fixed(kept))
    return Typed(tuple(axes))


@rule("max_pool1d", "avg_pool1d")
def pool1d(context: Context, x: Typed, window: Any, *_: Any, **__: Any) -> Typed:
    """Pool the last axis."""
    return _pool(context, x, 1, window)


@rule("max_pool2d", "avg_pool2d")
def pool2d(context: Context, x: Typed, window: Any, *_: Any, **__: Any) -> Typed:
    """Pool the last two axes (Funnel pools tokens with a window of 1 along the units)."""
    return _pool(context, x, 2, window)


@rule("max_pool3d", "avg_pool3d")
def pool3d(context: Context, x: Typed, window: Any, *_: Any, **__: Any) -> Typed:
    """Pool the last three axes."""
    return _pool(context, x, 3, window)


@rule("adaptive_avg_pool1d")
def adaptive_pool1d(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Pool the last axis to a given size."""
    return _pool(context, x, 1)


@rule("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def adaptive_pool2d(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Pool the last two axes to given sizes."""
    return _pool(context, x, 2)


@rule("adaptive_avg_pool3d", "_adaptive_avg_pool3d")
def adaptive_pool3d(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Pool the last three axes to given sizes."""
    return _pool(context, x, 3)


@rule("max_pool2d_with_indices", "adaptive_max_pool2d", "max_pool2d_with_indices")
def pool2d_with_indices(context: Context, x: Typed, *_: Any, **__: Any) -> Sequence[Typed]:
    """Pool the last two axes; positions are the second output."""
    pooled = _pool(context, x, 2)
    return [pooled, pooled]


@rule(
    "upsample_nearest1d", "upsample_linear1d", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d",
)  # fmt: skip
def upsample(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Resample the axes after batch and channels."""
    return _pool(context, x, x.rank - 2)
