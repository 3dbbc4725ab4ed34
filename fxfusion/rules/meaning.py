"""What the values of integer tensors say about units: top-k, argmax and sorting return *indices*.

A tensor whose values index the units of an axis E is typed as the one-hot tensor that it encodes: it
holds its own axes and E. When the units of E are permuted, the values change alike, so picking by them
(``weight[index]``), counting them (``histc``) and sorting by them need not fix E. Any operator that does
not declare that it reads such values gets them only after E has been fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fxfusion.axes import Axis, Leaf, resolve
from fxfusion.rules.context import Context, Meaning, Typed
from fxfusion.rules.registry import Rule

# Every element of the output is the element of the operand at the same place, or at another one.
_SAME = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "to", "_to_copy", "type_as")
_REARRANGED = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "squeeze", "unsqueeze", "permute",
    "permute_copy", "transpose", "swapaxes", "transpose_copy", "numpy_T", "t", "mT", "movedim", "moveaxis",
)  # fmt: skip
_PICKED = (
    "expand", "broadcast_to", "expand_copy", "expand_as", "repeat", "tile", "repeat_interleave", "slice",
    "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
    "unbind",
)  # fmt: skip
_JOINED = ("cat", "concat", "concatenate", "stack")
_EXACT = frozenset([torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])

_RuleT = TypeVar("_RuleT", bound=Rule)

_READERS: set[Callable[..., Any]] = set()


def reads_values(function: _RuleT) -> _RuleT:
    """Declare that a rule heeds the meaning of its operands' values; it sees them as they are."""
    _READERS.add(function)
    return function


def expose(context: Context, *operands: Any) -> None:
    """Fix what the values of operands index: the numbers themselves are used."""
    for operand in _tensors(operands):
        meaning = operand.meaning
        if meaning is not None and meaning.kind != "count":
            context.fix(meaning.axis, message="the numbers of its units are used")


def apply(
    context: Context, name: str, rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Typed | Sequence[Typed]:
    """Call the rule of an operator; carry the meaning of values where the operator only moves them."""
    if rule in _READERS:
        return rule(context, *args, **kwargs)
    given = list(_tensors((args, kwargs)))
    if not any(operand.meaning for operand in given):
        return rule(context, *args, **kwargs)
    meaning = _carried(context, name, args, given)
    if meaning is None:
        expose(context, given)
    result = rule(context, *_without(args), **_without(kwargs))
    if meaning is None:
        return result
    if isinstance(result, Typed):
        return dataclasses.replace(result, meaning=meaning)
    return [
        dataclasses.replace(item, meaning=dataclasses.replace(meaning, key=f"{meaning.key}:{number}"))
        for number, item in enumerate(result)
    ]


def _carried(context: Context, name: str, args: Sequence[Any], given: Sequence[Typed]) -> Meaning | None:
    """Return the meaning of the result's values; None if they are no longer the operands'."""
    first = given[0].meaning
    if name in _SAME:
        exact = context.dtypes and context.dtypes[0] in _EXACT
        return first if exact and given[0] is args[0] else None
    if first is None or first.kind != "index":
        return None
    key = context.place
    other_bits = any(isinstance(item, torch.dtype) for item in args)  # a view as another data type
    if name in _REARRANGED and given[0] is args[0] and not other_bits:
        return Meaning("index", first.axis, key, first.bag)
    if name in _PICKED and len(given) == 1:
        return Meaning("index", first.axis, key, key)
    if name in _JOINED:
        return _joined(context, given, key)
    return None


def _joined(context: Context, given: Sequence[Typed], key: str) -> Meaning | None:
    axis = None
    for operand in given:
        meaning = operand.meaning
        if meaning is None or meaning.kind != "index" or (axis and axis.size != meaning.axis.size):
            return None
        axis = meaning.axis if axis is None else context.unify(axis, meaning.axis)
    return None if axis is None else Meaning("index", axis, key, key)


def _tensors(value: Any) -> Iterator[Typed]:
    if isinstance(value, Typed):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _without(value: Any) -> Any:
    """Return arguments whose tensors mean nothing."""
    if isinstance(value, Typed):
        return dataclasses.replace(value, meaning=None) if value.meaning else value
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without(item) for item in value)
    return value


# -- picking by indices ---------------------------------------------------------------------------

INDEXED = "it is indexed by integers"


def meet(context: Context, units: Axis, indices: Typed) -> Axis | None:
    """Let indices meet the axis that they index: the units they stand for, or fixed ones.

    Returns the type of the axis, or None if it was fixed because the indices are mere numbers.
    """
    meaning = indices.meaning
    if meaning is not None and meaning.kind == "index" and meaning.axis.size == units.size:
        return context.unify(meaning.axis, units)
    expose(context, indices)
    context.fix(units, message=INDEXED)
    return None


def pick(context: Context, x: Typed, axis: int, indices: Typed) -> tuple[Axis, ...]:
    """Return the axes that take the place of one along which indices pick."""
    met = meet(context, x.axes[axis], indices)
    if met is not None and indices.meaning is not None and not indices.meaning.bijective:
        routed = context.routed(indices)
        if routed is not None:
            return routed
    context.mix([other for place, other in enumerate(x.axes) if place != axis], [x.axes[axis]])
    return indices.axes


def picked_meaning(context: Context, x: Typed, indices: Sequence[Typed]) -> Meaning | None:
    """Return what the values of a tensor of indices mean after some of them were picked."""
    meaning = x.meaning
    if meaning is None or meaning.kind != "index":
        return None
    if x.rank == 1 and len(indices) == 1 and indices[0].rank == 1:
        tokens = resolve(indices[0].axes[0])
        route = tokens.route if isinstance(tokens, Leaf) else None
        by = indices[0].meaning
        if route and by and by.bijective and route.source == meaning.key:  # as sorting itself orders them
            return Meaning("index", meaning.axis, route.key, meaning.bag)
    return Meaning("index", meaning.axis, context.place, context.place)
