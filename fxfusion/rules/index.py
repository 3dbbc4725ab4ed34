"""Indexing: whatever an integer picks has an order, unless it is the number of a unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.meaning import INDEXED, expose, meet, pick, picked_meaning, reads_values
from fxfusion.rules.registry import rule


@reads_values
@rule("embedding")
def embedding(context: Context, weight: Typed, indices: Typed, *_: Any, **__: Any) -> Typed:
    """``weight[indices]``: rows are vocabulary, columns pass."""
    if indices.meaning is None:
        context.fix(weight.axes[0], message="rows are a vocabulary")
    context.kept(weight, [1])
    return Typed((*pick(context, weight, 0, indices), weight.axes[1]))


@reads_values
@rule("index", "_unsafe_index")
def index(context: Context, x: Typed, indices: Sequence[Typed | None]) -> Typed:
    """``x[i, j, ...]`` with tensors of indices: the indexed axes have an order, the others pass."""
    if any(item is not None and item.boolean for item in indices):
        return _masked(context, x, indices)
    given = {axis: item for axis, item in enumerate(indices) if item is not None}
    places = list(given)
    meaning = picked_meaning(context, x, list(given.values()))
    stretch = _stretch(x, indices) if len(places) == 1 else None
    if stretch is not None:  # Falcon takes its key head as [..., [-2], :]
        return Typed(tuple(context.narrow(x, places[0], *stretch)), meaning=meaning)
    kept = [axis for place, axis in enumerate(x.axes) if place not in places]
    if len(places) == 1:
        picked = pick(context, x, places[0], given[places[0]])
    else:
        for axis, item in given.items():
            meet(context, x.axes[axis], item)
        context.mix(kept, [x.axes[axis] for axis in places])
        picked = context.broadcast(*given.values()).axes
    adjacent = places == list(range(places[0], places[-1] + 1))
    where = places[0] if adjacent else 0
    return Typed((*kept[:where], *picked, *kept[where:]), origins=x.origins, meaning=meaning)


def _stretch(x: Typed, indices: Sequence[Typed | None]) -> tuple[int, int] | None:
    """Return start and stop where the one index is a constant that counts up by one: it is a slice."""
    axis, item = next((axis, item) for axis, item in enumerate(indices) if item is not None)
    if item.value is None or item.rank != 1 or not item.shape[0]:
        return None
    places = item.value % x.shape[axis]
    start, stop = int(places[0]), int(places[0]) + item.shape[0]
    return (start, stop) if places.tolist() == list(range(start, stop)) else None


def _masked(context: Context, x: Typed, indices: Sequence[Typed | None]) -> Typed:
    """``x[mask]``: how many units are picked depends on the data; nothing may move."""
    expose(context, x, *indices)
    given = [axis for item in indices if item is not None for axis in item.axes]
    context.fix(*x.axes, *given, message="a mask picks from it")
    return Typed(tuple(context.fixed_like(context.shapes[0])))


@reads_values
@rule("index_select")
def index_select(context: Context, x: Typed, dim: int, indices: Typed) -> Typed:
    """Pick units of an axis."""
    axis = dim % x.rank
    meaning = picked_meaning(context, x, [indices])
    picked = pick(context, x, axis, indices) or (Constant(1),)
    return Typed((*x.axes[:axis], *picked, *x.axes[axis + 1 :]), origins=x.origins, meaning=meaning)


@reads_values
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
    expose(context, x, indices)
    context.fix(*x.axes, *indices.axes, message=INDEXED)
    return Typed(tuple(context.fixed_like(context.shapes[0])))


@reads_values
@rule("gather")
def gather(context: Context, x: Typed, dim: int, indices: Typed, **_: Any) -> Typed:
    """``x[..., indices[...], ...]`` along an axis; the other axes of both run together."""
    axis = dim % x.rank
    meet(context, x.axes[axis], indices)
    context.mix([item for other, item in enumerate(x.axes) if other != axis], [x.axes[axis]])
    axes = list(indices.axes)
    for other in range(x.rank):
        if other == axis:
            continue
        if x.shape[other] == indices.shape[other]:
            axes[other] = context.unify(x.axes[other], indices.axes[other])
        else:
            context.fix(x.axes[other], indices.axes[other], message="only a leading part of it is read")
            axes[other] = context.fixed(indices.shape[other])
    return Typed(tuple(axes), meaning=picked_meaning(context, x, ()))


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    context: Context, weight: Typed, indices: Typed, offsets: Typed, *more: Any, **named: Any
) -> Sequence[Typed]:
    """Sums, means or maxima of rows; of the other outputs only which row was largest has columns."""
    given = [indices, offsets, *(item for item in (*more, *named.values()) if isinstance(item, Typed))]
    expose(context, *given)
    context.fix(
        weight.axes[0], *(axis for item in given for axis in item.axes), message="rows are a vocabulary"
    )
    context.kept(weight, [1])
    return [
        Typed(
            (context.fixed(shape[0]), weight.axes[1]) if len(shape) == 2 else tuple(context.fixed_like(shape))
        )
        for shape in context.shapes
    ]


@rule("bucketize")
def bucketize(context: Context, x: Typed, boundaries: Typed, *_: Any, **__: Any) -> Typed:
    """The interval in which each number lies."""
    context.fix(boundaries.axes[0], message="intervals have an order")
    return Typed(x.axes)


@rule("searchsorted")
def searchsorted(context: Context, ordered: Typed, x: Typed, *_: Any, **named: Any) -> Typed:
    """The interval in which each number lies; with several rows of boundaries, of those of its row."""
    context.fix(ordered.axes[-1], message="intervals have an order")
    if isinstance(named.get("sorter"), Typed):
        context.fix(*ordered.axes, *named["sorter"].axes, message="it is sorted")
    if ordered.rank == 1 or not x.rank:
        return Typed(x.axes)
    return Typed((*context.broadcast(Typed(ordered.axes[:-1]), Typed(x.axes[:-1])).axes, x.axes[-1]))


@rule("tril", "triu")
def triangle(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Keep a triangle of the last two axes: both have an order."""
    context.fix(x.axes[-1], x.axes[-2], message="a triangle of it is kept")
    return Typed((*x.axes[:-2], *context.fixed_like(x.shape[-2:])))
