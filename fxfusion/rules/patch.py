"""Tensors of which a part is replaced, and diagonals."""

from __future__ import annotations

from typing import Any

from fxfusion.axes import Axis, Constant, is_free, resolve
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule
from fxfusion.rules.view import cat
from fxfusion.unify import has_constant


@rule("slice_scatter")
def slice_scatter(
    context: Context, x: Typed, source: Typed, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Typed:
    """``x[start:end:step] = source`` along an axis: what is left of ``x``, before and after, stays."""
    axis, size = dim % x.rank, x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    if step != 1 or not (is_free(x.axes[axis]) or is_free(source.axes[axis])):
        context.fix(x.axes[axis], source.axes[axis], message="a part of it is replaced")
        rest, inner = (
            Typed((*item.axes[:axis], Constant(1), *item.axes[axis + 1 :]), origins=item.origins)
            for item in (x, source)
        )
        others = context.broadcast(rest, inner).axes
        return Typed((*others[:axis], context.fixed(size), *others[axis + 1 :]))
    before = Typed(tuple(context.narrow(x, axis, 0, first))) if first else None
    after = Typed(tuple(context.narrow(x, axis, max(first, last), size))) if last < size else None
    return cat(context, [item for item in (before, source, after) if item is not None], axis)


@rule("select_scatter")
def select_scatter(context: Context, x: Typed, source: Typed, dim: int, index: int) -> Typed:
    """``x[index] = source`` along an axis."""
    axis, place = dim % x.rank, index % x.shape[dim]
    axes = (*source.axes[:axis], Constant(1), *source.axes[axis:])
    return slice_scatter(context, x, Typed(axes, origins=source.origins), axis, place, place + 1)


@rule("masked_scatter")
def masked_scatter(context: Context, x: Typed, mask: Typed, source: Typed) -> Typed:
    """Fill the masked elements from ``source``, row by row.

    Where the mask does not vary along the last axes, whole rows are filled: these axes are the source's.
    """
    rows = 0
    while rows < min(x.rank, source.rank) - 1 and _is_whole_row(x, mask, source, rows + 1):
        rows += 1
    first = x.rank - rows
    context.fix(
        *x.axes[:first], *mask.axes, *source.axes[: source.rank - rows], message="a mask picks from it"
    )
    kept = [context.unify(x.axes[place], source.axes[place - x.rank]) for place in range(first, x.rank)]
    return Typed((*context.fixed_like(x.shape[:first]), *kept))


def _is_whole_row(x: Typed, mask: Typed, source: Typed, place: int) -> bool:
    covered = mask.rank < place or isinstance(resolve(mask.axes[-place]), Constant)
    return covered and x.shape[-place] == source.shape[-place]


@rule("diagonal", "diagonal_copy")
def diagonal(context: Context, x: Typed, offset: int = 0, first: int = 0, second: int = 1) -> Typed:
    """The elements whose places along two axes are equal (or ``offset`` apart), as a new last axis."""
    pair = [x.axes[first], x.axes[second]]
    rest = [axis for place, axis in enumerate(x.axes) if place not in (first % x.rank, second % x.rank)]
    if offset == 0 and pair[0].size == pair[1].size:
        return Typed((*rest, context.unify(*pair)))
    context.fix(*pair, message="a diagonal of it is taken")
    return Typed((*rest, context.fixed(context.shapes[0][-1])))


@rule("linalg_diagonal")
def linalg_diagonal(
    context: Context, x: Typed, *, offset: int = 0, dim1: int = -2, dim2: int = -1, **_: Any
) -> Typed:
    """The diagonal of matrices, by default the last two axes."""
    return diagonal(context, x, offset, dim1, dim2)


@rule("diag_embed")
def diag_embed(context: Context, x: Typed, offset: int = 0, first: int = -2, second: int = -1) -> Typed:
    """A matrix with the last axis on its diagonal and zeros elsewhere."""
    size = context.shapes[0][first]
    axis: Axis = x.axes[-1]
    if offset or has_constant(axis):  # the zeros beside a constant make it vary
        context.fix(axis, message="it is the diagonal of a matrix")
        axis = context.fixed(size)
    axes = list(x.axes[:-1])
    for place in sorted((first % (x.rank + 1), second % (x.rank + 1))):
        axes.insert(place, axis)
    return Typed(tuple(axes))
