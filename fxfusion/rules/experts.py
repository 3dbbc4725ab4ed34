"""Mixtures of experts: choosing units by their values, and computing with the chosen ones.

A router's top-k gives the numbers of experts, which pick stacked weights, or by which tokens are sorted,
counted and multiplied group by group. Which number an expert has matters to none of this, so the experts
may be permuted; :mod:`fxfusion.rules.meaning` keeps track of what the numbers stand for. Equal scores are
taken for a coincidence, except among integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxfusion.axes import Axis, Constant, Route, is_free, leaves_of, resolve
from fxfusion.rules.context import Context, Meaning, Typed, Use
from fxfusion.rules.meaning import expose, meet, reads_values
from fxfusion.rules.reduce import reduce_axes
from fxfusion.rules.registry import rule
from fxfusion.unify import has_constant

# -- choosing -------------------------------------------------------------------------------------


def _chosen(context: Context, x: Typed, axis: int) -> Meaning | None:
    """Return what the positions of the largest (or smallest, or sorted) values along an axis mean.

    Where equal values are to be expected, which comes first depends on the order: the axis is fixed.
    """
    units = x.axes[axis]
    expose(context, x)
    if x.whole or x.boolean or has_constant(units):
        context.fix(units, message="equal values along it are told apart by their order")
    if has_constant(units):
        return None
    return Meaning("index", units, context.place, context.place)


@reads_values
@rule("topk")
def topk(
    context: Context, x: Typed, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> Sequence[Typed]:
    """The ``k`` largest values along an axis and where they are."""
    if not x.rank:
        return [Typed(()), Typed(())]
    axis = dim % x.rank
    meaning = _chosen(context, x, axis)
    kept = [other for place, other in enumerate(x.axes) if place != axis]
    context.mix(kept, [x.axes[axis]])
    rank = context.fixed(k, "it enumerates ranks") if ordered else context.ordered_by(k, [x.axes[axis]])
    axes = (*x.axes[:axis], rank, *x.axes[axis + 1 :])
    return [Typed(axes), Typed(axes, meaning=meaning)]


@reads_values
@rule("max", "min")
def extremum(context: Context, x: Typed, dim: Any = None, keepdim: bool = False) -> Typed | Sequence[Typed]:
    """The largest value: of two tensors element by element, of all, or along an axis with its position."""
    if isinstance(dim, Typed):
        expose(context, x, dim)
        return context.broadcast(x, dim)
    if dim is None or not x.rank:
        expose(context, x)
        values = reduce_axes(context, x, None, False)
        return values if dim is None else [values, values]
    meaning = _chosen(context, x, dim % x.rank)
    values = reduce_axes(context, x, dim, keepdim)
    return [values, Typed(values.axes, meaning=meaning)]


@reads_values
@rule("argmax", "argmin")
def position(context: Context, x: Typed, dim: Any = None, keepdim: bool = False) -> Typed:
    """The position of an extremum; without ``dim``, in the flattened tensor."""
    if dim is None or not x.rank:
        expose(context, x)
        context.fix(*x.axes, message="a position along it is an output")
        return reduce_axes(context, x, None, keepdim)
    meaning = _chosen(context, x, dim % x.rank)
    return Typed(reduce_axes(context, x, dim, keepdim).axes, meaning=meaning)


@reads_values
@rule("sort", "argsort")
def sort(
    context: Context, x: Typed, dim: Any = -1, descending: bool = False, **named: Any
) -> Typed | Sequence[Typed]:
    """Sort along an axis; a vector that holds numbers of units is put in groups, one per unit."""
    dim, descending = named.get("dim", dim), named.get("descending", descending)
    if not x.rank:
        found = [Typed(()), Typed(())]
    elif x.rank == 1 and x.meaning is not None and x.meaning.kind == "index" and not descending:
        found = _inverted(context, x) if x.meaning.bijective else _grouped(context, x)
    else:
        axis = dim % x.rank
        meaning = _chosen(context, x, axis)
        context.mix([other for place, other in enumerate(x.axes) if place != axis], [x.axes[axis]])
        rank = context.fixed(x.shape[axis], "it enumerates ranks")
        axes = (*x.axes[:axis], rank, *x.axes[axis + 1 :])
        found = [Typed(axes), Typed(axes, meaning=meaning)]
    return found if len(context.shapes) > 1 else found[1]


def _grouped(context: Context, x: Typed) -> list[Typed]:
    """Sort tokens by their expert: new experts' numbers put the groups, and so the tokens, in a new order."""
    meaning, place = x.meaning, context.place
    assert meaning is not None
    route = Route(meaning.axis, place, meaning.key, meaning.bag)
    tokens = context.ordered_by(x.shape[0], (meaning.axis, x.axes[0]), route)
    order = Meaning("index", x.axes[0], f"{place}:order", f"{place}:order", bijective=True)
    return [
        Typed((tokens,), meaning=Meaning("index", meaning.axis, place, meaning.bag)),
        Typed((tokens,), meaning=order),
    ]


def _inverted(context: Context, x: Typed) -> list[Typed]:
    """Sort a permutation, which gives its inverse."""
    meaning, place = x.meaning, context.place
    assert meaning is not None
    if len(context.shapes) > 1:
        expose(context, x)
    inverse = Meaning("index", x.axes[0], f"{place}:order", f"{place}:order", bijective=True)
    return [Typed((meaning.axis,)), Typed((meaning.axis,), meaning=inverse)]


# -- numbers of units -----------------------------------------------------------------------------


@reads_values
@rule("div", "floor_divide", "remainder", "fmod")
def quotient(context: Context, x: Any, other: Any, **named: Any) -> Typed:
    """Divide. A unit's number by the size of an inner factor gives the outer unit's, the rest the inner's."""
    given = [item for item in (x, other) if isinstance(item, Typed)]
    outer = "floor_divide" in context.operator or named.get("rounding_mode") in ("floor", "trunc")
    inner = "remainder" in context.operator or "fmod" in context.operator
    meaning = given[0].meaning
    if (
        (outer or inner)
        and meaning is not None
        and meaning.kind == "index"
        and isinstance(other, int)
        and is_free(meaning.axis)
        and 0 < other <= meaning.axis.size
        and meaning.axis.size % other == 0
    ):
        factors = context.regroup([meaning.axis], [meaning.axis.size // other, other])
        return Typed(x.axes, meaning=Meaning("index", factors[inner], context.place, context.place))
    expose(context, *given)
    return context.broadcast(*given)


@reads_values
@rule("one_hot")
def one_hot(context: Context, x: Typed, classes: int = -1) -> Typed:
    """One-hot encoding: the new axis is the one that the values index; more classes never occur."""
    size = context.shapes[0][-1]
    meaning = x.meaning
    if meaning is None or meaning.kind != "index" or meaning.axis.size > size:
        expose(context, x)
        return Typed((*x.axes, context.fixed(size)))
    if meaning.axis.size == size:
        return Typed((*x.axes, meaning.axis))
    return Typed((*x.axes, context.concat([meaning.axis, Constant(size - meaning.axis.size)])))


@reads_values
@rule("histc", "bincount")
def count(context: Context, x: Typed, *args: Any, **kwargs: Any) -> Typed:
    """Count values; numbers of units are counted per unit."""
    size = context.shapes[0][0]
    given = dict(zip(("bins", "min", "max"), args, strict=False)) | kwargs
    exact = "bincount" in context.operator or (given.get("min", 0), given.get("max", 0)) == (0, size - 1)
    context.mix([], x.axes)
    meaning = x.meaning
    weighted = any(isinstance(item, Typed) for item in given.values())
    if meaning is None or meaning.kind != "index" or meaning.axis.size != size or not exact or weighted:
        expose(context, x)
        if weighted:
            context.fix(*x.axes, *next(item.axes for item in given.values() if isinstance(item, Typed)))
        return Typed((context.fixed(size, "it enumerates values"),))
    # A routed token's own expert is what is counted: its factors stay together.
    plain = [axis for axis in x.axes if not any(leaf.route for leaf in leaves_of(axis))]
    context.mix([meaning.axis], plain)
    return Typed((meaning.axis,), meaning=Meaning("count", meaning.axis, context.place, meaning.bag))


@reads_values
@rule("cumsum")
def cumsum(context: Context, x: Typed, dim: int, **_: Any) -> Typed:
    """Running sum along an axis, whose order matters, unless what is summed up are group sizes."""
    meaning = x.meaning
    if meaning is not None and meaning.kind == "count" and x.rank == 1:
        return Typed(x.axes, meaning=Meaning("offset", meaning.axis, context.place, meaning.bag))
    expose(context, x)
    axis = dim % x.rank if x.rank else 0
    context.fix(*x.axes[axis : axis + 1], message="the order along it matters")
    fixed = [context.fixed(size) for size in x.shape[axis : axis + 1]]
    return Typed((*x.axes[:axis], *fixed, *x.axes[axis + 1 :]))


# -- computing by group ---------------------------------------------------------------------------


@reads_values
@rule("transformers::grouped_mm_fallback", "_grouped_mm")
def grouped_mm(context: Context, x: Typed, weight: Typed, offs: Any = None, *_: Any, **__: Any) -> Typed:
    """Multiply each group of rows by a matrix of its own; ``offs`` says where the groups end."""
    if (x.rank, weight.rank) != (2, 3) or not isinstance(offs, Typed):
        raise ValueError("only a matrix of tokens times stacked matrices is covered")
    context.mix([x.axes[0]], [x.axes[1]])
    context.mix([weight.axes[0], weight.axes[2]], [weight.axes[1]])
    context.unify(x.axes[1], weight.axes[1])
    for axis, contracted in ((0, False), (1, True), (2, False)) if weight.origins else ():
        context.records.uses.append(Use(weight, axis, contracted))
    tokens = x.axes[0]
    if not _are_groups(context, tokens, offs):
        expose(context, x, offs)
        message = "rows are multiplied by the matrix of their group, and no sorting by groups was seen"
        context.fix(tokens, weight.axes[0], *offs.axes, message=message)
        context.mix([weight.axes[2]], [weight.axes[0]])
        rows = context.fixed(tokens.size) if has_constant(tokens) else tokens
        return Typed((rows, weight.axes[2]))
    assert offs.meaning is not None
    context.unify(weight.axes[0], offs.meaning.axis)
    return Typed((tokens, weight.axes[2]))


def _are_groups(context: Context, tokens: Axis, offs: Typed) -> bool:
    """Return whether tokens were sorted by the very numbers that were counted for the offsets."""
    tokens = resolve(tokens)
    route = getattr(tokens, "route", None)
    meaning = offs.meaning
    if tokens.size == 1:
        return False
    return (
        meaning is not None
        and meaning.kind == "offset"
        and isinstance(route, Route)
        and bool(route.bag)
        and route.bag == meaning.bag
    )


# -- putting --------------------------------------------------------------------------------------


@reads_values
@rule("index_add", "index_copy", "index_reduce")
def index_add(
    context: Context, x: Typed, dim: int, indices: Typed, source: Typed, *_: Any, **__: Any
) -> Typed:
    """Add slices of ``source`` to those of ``x`` that the indices name."""
    axis = dim % x.rank
    units = context.unify(indices.axes[0], source.axes[axis]) if indices.rank else source.axes[axis]
    return _put(context, x, axis, indices, [units], source, "copy" not in context.operator)


@reads_values
@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(
    context: Context, x: Typed, dim: int, indices: Typed, source: Any, *args: Any, **kwargs: Any
) -> Typed:
    """Put elements of ``source``, or one number, along an axis where the indices say."""
    if not x.rank:
        raise ValueError("only tensors with axes are covered")
    axis = dim % x.rank
    inverse = _inverse(context, x, indices, source)
    if inverse is not None:
        return inverse
    for other in range(x.rank):
        sizes = [item.shape[other] for item in (x, source) if isinstance(item, Typed)]
        if other != axis and any(size != indices.shape[other] for size in sizes):
            met = [item.axes[other] for item in (x, indices, source) if isinstance(item, Typed)]
            raise ValueError(f"only a part of axes of {[item.size for item in met]} units is written")
    if isinstance(source, Typed) and source.shape[axis] != indices.shape[axis]:
        raise ValueError("only a leading part of the source is read")
    symmetric = not isinstance(source, Typed) or ".src" not in context.operator
    places = [indices.axes[axis]]
    joined = indices
    if isinstance(source, Typed):
        joined = context.broadcast(Typed(indices.axes), source)
        places = [joined.axes[axis]]
    return _put(context, x, axis, indices, places, Typed(joined.axes), symmetric)


@reads_values
@rule("index_put")
def index_put(
    context: Context, x: Typed, indices: Sequence[Typed | None], values: Typed, accumulate: bool = False
) -> Typed:
    """``x[i] = values`` or ``x[i] += values`` with one tensor of integers."""
    given = [(place, item) for place, item in enumerate(indices) if item is not None]
    if len(given) != 1 or given[0][1].boolean:
        raise ValueError("only one index of integers is covered")
    axis, item = given[0]
    inverse = _inverse(context, x, item, values)
    if inverse is not None:
        return inverse
    target = Typed((*x.axes[:axis], *item.axes, *x.axes[axis + 1 :]))
    expose(context, values)
    joined = context.broadcast(Typed(tuple(target.axes)), Typed(values.axes, origins=values.origins))
    places = list(joined.axes[axis : axis + item.rank])
    kept = (*joined.axes[:axis], Constant(1), *joined.axes[axis + item.rank :])
    return _put(context, x, axis, item, places, Typed(kept), accumulate)


def _put(
    context: Context,
    x: Typed,
    axis: int,
    indices: Typed,
    places: Sequence[Axis],
    source: Typed,
    symmetric: bool,
) -> Typed:
    """Return ``x`` with elements put along an axis; where two meet, the later wins unless ``symmetric``."""
    expose(context, x, source)
    if not symmetric and not (indices.meaning and indices.meaning.bijective):
        context.fix(*places, message="where two are written to one place, the later one stays")
    without = (Typed((*item.axes[:axis], Constant(1), *item.axes[axis + 1 :])) for item in (x, source))
    kept = context.broadcast(*without).axes
    others = [other for place, other in enumerate(kept) if place != axis]
    context.mix(others, places)
    context.mix(others, [x.axes[axis]])
    units = meet(context, x.axes[axis], indices)
    return Typed((*kept[:axis], context.fixed(x.shape[axis]) if units is None else units, *kept[axis + 1 :]))


def _inverse(context: Context, x: Typed, indices: Typed, source: Any) -> Typed | None:
    """Return the inverse of a permutation, if that is what counting up at its places makes."""
    meaning = indices.meaning
    if meaning is None or not meaning.bijective or x.rank != 1 or indices.rank != 1:
        return None
    value = source.value if isinstance(source, Typed) else None
    if x.shape != indices.shape or value is None or value.shape != indices.shape:
        return None
    if not torch.equal(value, torch.arange(len(value), dtype=value.dtype)):
        return None
    place = context.place
    return Typed((meaning.axis,), meaning=Meaning("index", indices.axes[0], place, place, bijective=True))
