"""Operators that only rearrange: every output element is one input element (or padding)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Axis, Constant, is_free
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "squeeze", "unsqueeze")
def view(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Row-major view with the output's sizes; squeezing and unsqueezing are views too."""
    return Typed(tuple(context.regroup(x.axes, context.shapes[0])))


@rule("permute", "permute_copy")
def permute(context: Context, x: Typed, dims: Sequence[int]) -> Typed:
    """Reorder axes."""
    return Typed(tuple(x.axes[dim] for dim in dims))


@rule("transpose", "swapaxes", "transpose_copy")
def transpose(context: Context, x: Typed, first: int, second: int) -> Typed:
    """Swap two axes."""
    axes = list(x.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return Typed(tuple(axes))


@rule("numpy_T")
def reverse_axes(context: Context, x: Typed) -> Typed:
    """Reverse the order of all axes."""
    return Typed(x.axes[::-1])


@rule("t", "mT", "adjoint")
def matrix_transpose(context: Context, x: Typed) -> Typed:
    """Swap the last two axes; a vector stays."""
    return Typed(x.axes if x.rank < 2 else (*x.axes[:-2], x.axes[-1], x.axes[-2]))


@rule("movedim", "moveaxis")
def movedim(context: Context, x: Typed, source: Any, destination: Any) -> Typed:
    """Move axes to new places, the others keeping their order."""
    sources = [source] if isinstance(source, int) else list(source)
    destinations = [destination] if isinstance(destination, int) else list(destination)
    sources = [dim % x.rank for dim in sources]
    rest = iter(dim for dim in range(x.rank) if dim not in sources)
    placed = dict(zip((dim % x.rank for dim in destinations), sources, strict=True))
    return Typed(tuple(x.axes[placed[dim] if dim in placed else next(rest)] for dim in range(x.rank)))


@rule("expand", "broadcast_to", "expand_copy", "expand_as")
def expand(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Repeat axes of size one: the result does not vary along them. ``expand_as`` reads a size only."""
    shape = context.shapes[0]
    axes: list[Axis] = [Constant(size) for size in shape[: len(shape) - x.rank]]
    for axis, size in zip(x.axes, shape[len(shape) - x.rank :], strict=True):
        axes.append(axis if axis.size == size else Constant(size))
    return Typed(tuple(axes))


@rule("repeat", "tile")
def repeat(context: Context, x: Typed, repeats: Sequence[int]) -> Typed:
    """Repeat the whole tensor along axes: constant times the axis, the copies outermost."""
    shape = context.shapes[0]
    padded = [Constant(1)] * (len(shape) - x.rank) + list(x.axes)
    return Typed(
        tuple(
            context.flatten([Constant(size // axis.size), axis])
            for axis, size in zip(padded, shape, strict=True)
        )
    )


@rule("repeat_interleave")
def repeat_interleave(context: Context, x: Typed, repeats: Any, dim: Any = None, **_: Any) -> Typed:
    """Repeat each unit of an axis: the axis times a constant, the copies innermost."""
    source = Typed((context.flatten(x.axes),)) if dim is None else x
    axis = 0 if dim is None else dim % x.rank
    if not isinstance(repeats, int):
        context.fix(source.axes[axis], message="units are repeated unequally often")
        return Typed((*source.axes[:axis], context.fixed(context.shapes[0][axis]), *source.axes[axis + 1 :]))
    grown = context.flatten([source.axes[axis], Constant(repeats)])
    return Typed((*source.axes[:axis], grown, *source.axes[axis + 1 :]))


@rule("slice")
def slice_(
    context: Context, x: Typed, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Typed:
    """``x[start:end:step]`` along an axis. A step gives positions a meaning unless the axis divides."""
    axis, size = dim % x.rank, x.shape[dim]
    first = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    last = size if end is None else min(max(end + (size if end < 0 else 0), first), size)
    if step == 1:
        return Typed(tuple(context.narrow(x, axis, first, last)))
    if size % step == 0 and last == size and first < step:
        return _strided(context, x, axis, first, step)
    context.fix(x.axes[axis], message="a strided slice picks units by position")
    return Typed((*x.axes[:axis], context.fixed(context.shapes[0][axis]), *x.axes[axis + 1 :]))


def _strided(context: Context, x: Typed, axis: int, start: int, step: int) -> Typed:
    """``x[start::step]`` is position ``start`` of the inner factor of (size / step) times step."""
    sizes = [*x.shape[:axis], x.shape[axis] // step, step, *x.shape[axis + 1 :]]
    split = Typed(tuple(context.regroup(x.axes, sizes)))
    kept = context.narrow(split, axis + 1, start, start + 1)
    return Typed((*kept[: axis + 1], *kept[axis + 2 :]))


@rule("select")
def select(context: Context, x: Typed, dim: int, index: int) -> Typed:
    """``x[index]`` along an axis, which goes away."""
    axis, position = dim % x.rank, index % x.shape[dim]
    kept = context.narrow(x, axis, position, position + 1)
    return Typed((*kept[:axis], *kept[axis + 1 :]))


@rule("narrow")
def narrow(context: Context, x: Typed, dim: int, start: int, length: int) -> Typed:
    """``x[start : start + length]`` along an axis."""
    first = start + x.shape[dim] if start < 0 else start
    return Typed(tuple(context.narrow(x, dim % x.rank, first, first + length)))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(context: Context, x: Typed, sections: Any, dim: int = 0) -> list[Typed]:
    """Part an axis; the output shapes say where."""
    pieces, position, axis = [], 0, dim % x.rank
    for shape in context.shapes:
        pieces.append(Typed(tuple(context.narrow(x, axis, position, position + shape[axis]))))
        position += shape[axis]
    return pieces


@rule("unbind")
def unbind(context: Context, x: Typed, dim: int = 0) -> list[Typed]:
    """Every ``x[i]`` along an axis."""
    return [select(context, x, dim, index) for index in range(x.shape[dim])]


@rule("cat", "concat", "concatenate")
def cat(context: Context, tensors: Sequence[Typed], dim: int = 0) -> Typed:
    """Concatenate along an axis; the other axes unify."""
    kept = [tensor for tensor in tensors if tensor.shape != (0,)]
    axis = dim % kept[0].rank
    others = context.broadcast(*(_without(tensor, axis) for tensor in kept))
    axes = list(others.axes)
    axes[axis] = context.concat([tensor.axes[axis] for tensor in kept])
    return Typed(tuple(axes))


def _without(tensor: Typed, axis: int) -> Typed:
    axes = (*tensor.axes[:axis], Constant(1), *tensor.axes[axis + 1 :])
    return Typed(axes, origins=tensor.origins, value=tensor.value)


@rule("stack")
def stack(context: Context, tensors: Sequence[Typed], dim: int = 0) -> Typed:
    """Stack along a new axis, one summand per tensor."""
    axis = dim % (tensors[0].rank + 1)
    axes = list(context.broadcast(*tensors).axes)
    axes.insert(axis, context.concat([Constant(1)] * len(tensors)))
    return Typed(tuple(axes))


@rule("pad", "constant_pad_nd")
def pad(
    context: Context, x: Typed, padding: Sequence[int], mode: Any = "constant", value: Any = None
) -> Typed:
    """Pad the last axes. A free axis gets constant summands; other modes read positions."""
    axes = list(x.axes)
    for index in range(len(padding) // 2):
        axis, before, after = x.rank - 1 - index, padding[2 * index], padding[2 * index + 1]
        if before == after == 0:
            continue
        if (isinstance(mode, str) and mode != "constant") or not is_free(axes[axis]):
            context.fix(axes[axis], message="it is padded")
            axes[axis] = context.fixed(x.shape[axis] + before + after)
            continue
        inner = Typed(tuple(axes))
        axes = context.narrow(inner, axis, max(-before, 0), x.shape[axis] + min(after, 0))
        grown = [Constant(max(before, 0)), axes[axis], Constant(max(after, 0))]
        axes[axis] = context.concat([item for item in grown if item.size])
    return Typed(tuple(axes))


@rule("roll")
def roll(context: Context, x: Typed, shifts: Sequence[int], dims: Sequence[int] = ()) -> Typed:
    """Rotate axes: positions along them have a meaning."""
    rolled = range(x.rank) if not dims else [dim % x.rank for dim in dims]
    context.fix(*(x.axes[dim] for dim in rolled), message="it is rolled")
    return _reordered(context, x, rolled)


@rule("flip")
def flip(context: Context, x: Typed, dims: Sequence[int]) -> Typed:
    """Reverse axes: positions along them have a meaning."""
    context.fix(*(x.axes[dim] for dim in dims), message="it is reversed")
    return _reordered(context, x, [dim % x.rank for dim in dims])


def _reordered(context: Context, x: Typed, dims: Sequence[int]) -> Typed:
    """Return new fixed axes where positions moved; rolling all axes as one mixes them."""
    return Typed(tuple(context.fixed(axis.size) if dim in dims else axis for dim, axis in enumerate(x.axes)))
