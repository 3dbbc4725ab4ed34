"""Indexing: whatever an integer picks has an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule

_INDEXED = "it is indexed by integers"


@rule("embedding")
def embedding(context: Context, weight: Typed, indices: Typed, *_: Any, **__: Any) -> Typed:
    """``weight[indices]``: rows are vocabulary, columns pass."""
    context.fix(weight.axes[0], message="rows are a vocabulary")
    context.kept(weight, [1])
    return Typed((*indices.axes, weight.axes[1]))


@rule("index", "_unsafe_index")
def index(context: Context, x: Typed, indices: Sequence[Typed | None]) -> Typed:
    """``x[i, j, ...]`` with tensors of indices: the indexed axes have an order, the others pass."""
    if any(item is not None and item.boolean for item in indices):
        return _masked(context, x, indices)
    places = [axis for axis, item in enumerate(indices) if item is not None]
    context.fix(*(x.axes[axis] for axis in places), message=_INDEXED)
    picked = context.broadcast(*(item for item in indices if item is not None)).axes
    adjacent = places == list(range(places[0], places[-1] + 1))
    where = places[0] if adjacent else 0
    kept = [axis for place, axis in enumerate(x.axes) if place not in places]
    return Typed((*kept[:where], *picked, *kept[where:]))


def _masked(context: Context, x: Typed, indices: Sequence[Typed | None]) -> Typed:
    """``x[mask]``: how many units are picked depends on the data; nothing may move."""
    given = [axis for item in indices if item is not None for axis in item.axes]
    context.fix(*x.axes, *given, message="a mask picks from it")
    return Typed(tuple(context.fixed_like(context.shapes[0])))


@rule("index_select")
def index_select(context: Context, x: Typed, dim: int, indices: Typed) -> Typed:
    """Pick units of an axis."""
    axis = dim % x.rank
    context.fix(x.axes[axis], message=_INDEXED)
    return Typed((*x.axes[:axis], *indices.axes, *x.axes[axis + 1 :]))


@rule("take_along_dim")
def take_along_dim(context: Context, x: Typed, indices: Typed, dim: int | None = None) -> Typed:
    """Like gather, with the dimension last and the other axes broadcast."""
    if dim is not None and x.rank == indices.rank:
        axis = dim % x.rank
        unequal = [
            other for other in range(x.rank) if other != axis and x.shape[other] != indices.shape[other]
        ]
        if not unequal:
            return gather(context, x, dim, indices)
    context.fix(*x.axes, *indices.axes, message=_INDEXED)
    return Typed(tuple(context.fixed_like(context.shapes[0])))


@rule("gather")
def gather(context: Context, x: Typed, dim: int, indices: Typed, **_: Any) -> Typed:
    """``x[..., indices[...], ...]`` along an axis; the other axes of both run together."""
    axis = dim % x.rank
    context.fix(x.axes[axis], message=_INDEXED)
    axes = list(indices.axes)
    for other in range(x.rank):
        if other == axis:
            continue
        if x.shape[other] == indices.shape[other]:
            axes[other] = context.unify(x.axes[other], indices.axes[other])
        else:
            context.fix(x.axes[other], indices.axes[other], message="only a leading part of it is read")
            axes[other] = context.fixed(indices.shape[other])
    return Typed(tuple(axes))


@rule("tril", "triu")
def triangle(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Keep a triangle of the last two axes: both have an order."""
    context.fix(x.axes[-1], x.axes[-2], message="a triangle of it is kept")
    return Typed((*x.axes[:-2], *context.fixed_like(x.shape[-2:])))
