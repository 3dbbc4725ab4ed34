"""Windows, samples and resampling: positions are looked up, channels pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule

_WINDOWS = "windows are taken along it"


@rule("unfold", "unfold_copy")
def unfold(context: Context, x: Typed, dim: int, size: int, step: int) -> Typed:
    """Windows of ``size`` along an axis, their inside as a new last axis; a view if they tile it."""
    if not x.rank:
        return Typed((context.fixed(size),))
    axis, count = dim % x.rank, context.shapes[0][dim % x.rank]
    if size == step and count * size == x.shape[axis]:
        windows, inside = context.regroup([x.axes[axis]], [count, size])
    else:
        context.fix(x.axes[axis], message=_WINDOWS)
        windows, inside = context.fixed(count), context.fixed(size)
    return Typed((*x.axes[:axis], windows, *x.axes[axis + 1 :], inside))


@rule("im2col")
def im2col(context: Context, x: Typed, kernel: Sequence[int], *_: Any) -> Typed:
    """Patches: ``[..., c, h, w]`` -> ``[..., c * taps, positions]``."""
    context.fix(*x.axes[-2:], message=_WINDOWS)
    taps, positions = context.fixed(math.prod(kernel)), context.fixed(context.shapes[0][-1])
    return Typed((*x.axes[:-3], context.flatten([x.axes[-3], taps]), positions))


@rule("col2im")
def col2im(context: Context, x: Typed, size: Sequence[int], kernel: Sequence[int], *_: Any) -> Typed:
    """Sum of patches: ``[..., c * taps, positions]`` -> ``[..., c, h, w]``."""
    count = math.prod(kernel)
    channels, taps = context.regroup([x.axes[-2]], [x.shape[-2] // count, count])
    context.fix(taps, x.axes[-1], message=_WINDOWS)
    return Typed((*x.axes[:-2], channels, *context.fixed_like(context.shapes[0][-2:])))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(context: Context, x: Typed, grid: Typed, *_: Any) -> Typed:
    """Sample ``x [b, c, positions...]`` at ``grid [b, places..., coordinates]``."""
    context.fix(*x.axes[2:], grid.axes[-1], message="places in it have coordinates")
    return Typed((context.unify(x.axes[0], grid.axes[0]), x.axes[1], *grid.axes[1:-1]))


@rule(
    "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def resample(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Look up the positions of an image; batch and channels, before them, pass."""
    spatial = int(context.operator.split("d.")[0][-1])
    return Typed((*x.axes[:-spatial], *_positions(context, x, spatial)))


@rule(
    "adaptive_max_pool1d", "adaptive_max_pool3d", "max_pool1d_with_indices", "max_pool3d_with_indices",
    "fractional_max_pool2d", "fractional_max_pool3d",
)  # fmt: skip
def pool_with_indices(context: Context, x: Typed, *more: Any, **_: Any) -> Sequence[Typed]:
    """Pool the last axes; positions are the second output."""
    operator = context.operator
    spatial = int(operator[operator.index("pool") + 4])
    kept = Typed(x.axes[:-spatial])
    for samples in (item for item in more if isinstance(item, Typed)):  # where windows start, per channel
        context.fix(samples.axes[-1])
        kept = context.broadcast(kept, Typed(samples.axes[:-1]))
    pooled = Typed((*kept.axes[-len(x.axes[:-spatial]) :], *_positions(context, x, spatial)))
    return [pooled, pooled]


@rule("max_unpool2d", "max_unpool3d")
def unpool(context: Context, x: Typed, indices: Typed, *_: Any) -> Typed:
    """Put values back to the positions from which they were pooled."""
    spatial = int(context.operator[context.operator.index("pool") + 4])
    context.fix(*x.axes[-spatial:], *indices.axes[-spatial:], message=_WINDOWS)
    kept = context.broadcast(Typed(x.axes[:-spatial]), Typed(indices.axes[:-spatial])).axes
    return Typed((*kept, *context.fixed_like(context.shapes[0][-spatial:])))


def _positions(context: Context, x: Typed, spatial: int) -> Sequence[Any]:
    context.fix(*x.axes[-spatial:], message="the operator looks at neighbouring positions")
    return context.fixed_like(context.shapes[0][-spatial:])
