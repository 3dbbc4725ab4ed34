"""Dependencies between spaces: where an inner space may move differently for each unit of an outer one.

Below a head, head_dim may be permuted differently from head to head exactly where

1. every tensor that holds the inner space also holds the outer one, paired with it, and
2. no operator mixes over the outer space while it keeps the inner one in place.

The same two conditions give per-group channels, per-expert hidden units, and query heads per key head,
and rightly refuse a parameter that all heads share. (In group theory: a wreath product.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxfusion.axes import Axis, Leaf, Route, leaves_of, resolve
from fxfusion.inference import Inferred
from fxfusion.layout import leaf_blocks

_Occurrences = list[tuple[Leaf, int]]  # leaf and the axis it lies in, in order


def dependencies(inferred: Inferred, held: frozenset[Leaf]) -> dict[Leaf, tuple[Leaf, ...]]:
    """Return for every free leaf the leaves on whose units its permutation may depend, outermost first.

    Parameters
    ----------
    inferred : Inferred
    held : frozenset of Leaf
        The leaves that parameters hold: only on those can a transport depend.

    Returns
    -------
    dict of Leaf to tuple of Leaf
    """
    outer: dict[Leaf, set[Leaf]] = {}
    rank: dict[Leaf, int] = {}
    seen: set[tuple[int, ...]] = set()
    inner = inferred.context.records.inner
    for axes in [*inferred.parameters.values(), *inferred.tensors.values(), *inner]:
        relevant = _relevant(axes)
        if relevant and _first(relevant, seen):
            for block in _blocks(relevant, held):
                _hold(block, outer, rank)
    seen = set()
    for mix in inferred.context.records.mixes:
        kept, mixed = _relevant(mix.kept), _relevant(mix.mixed)
        if kept and mixed and _first([*kept, None, *mixed], seen):
            _mix(kept, mixed, outer, held)
    return _chains(outer, rank, held)


def _is_free(leaf: Leaf) -> bool:
    return leaf.fixed is None and leaf.size > 1


def _relevant(axes: Iterable[Axis]) -> list[Axis]:
    return [resolved for axis in axes if (resolved := resolve(axis)).size > 1 and any(leaves_of(resolved))]


def _first(axes: Sequence[Axis | None], seen: set[tuple[int, ...]]) -> bool:
    key = tuple(id(axis) for axis in axes)
    if key in seen or not any(
        _is_free(leaf) for axis in axes if axis is not None for leaf in leaves_of(axis)
    ):
        return False
    seen.add(key)
    return True


def _blocks(axes: Sequence[Axis], held: frozenset[Leaf]) -> Iterable[_Occurrences]:
    for leaves in leaf_blocks(axes, lambda leaf: leaf in held or leaf.route is not None):
        block = [(leaf, axis) for axis, found in enumerate(leaves) for leaf in found]
        yield [*block, *_routes(block)]


def _routes(block: _Occurrences) -> _Occurrences:
    """Return the units that routed tokens belong to, as if the tensor held them along the tokens' axis."""
    found: dict[Route, list[int]] = {}
    for leaf, axis in block:
        if leaf.route is not None:
            found.setdefault(leaf.route, []).append(axis)
    return [
        (leaf, axes[0])
        for route, axes in found.items()
        if len(axes) == route.rank
        for leaf in leaves_of(route.axis)
    ]


def _hold(block: _Occurrences, outer: dict[Leaf, set[Leaf]], rank: dict[Leaf, int]) -> None:
    places: dict[Leaf, list[int]] = {}
    for leaf, axis in block:
        rank.setdefault(leaf, len(rank))
        places.setdefault(leaf, []).append(axis)
    for leaf, axes in places.items():
        if not _is_free(leaf):
            continue
        paired = {other for other, where in places.items() if other is not leaf and _pairs(axes, where)}
        outer[leaf] = outer[leaf] & paired if leaf in outer else paired


def _pairs(inner: Sequence[int], outer: Sequence[int]) -> bool:
    """Return whether each place of the inner leaf has one place of the outer leaf that goes with it."""
    if len(outer) == 1 and outer[0] not in inner:
        return True
    return sorted(inner) == sorted(outer) and len(set(inner)) == len(inner)


def _mix(
    kept: Sequence[Axis], mixed: Sequence[Axis], outer: dict[Leaf, set[Leaf]], held: frozenset[Leaf]
) -> None:
    for block in _blocks([*kept, *mixed], held):
        moved = {leaf for leaf, axis in block if axis >= len(kept)}
        moved |= {item for leaf in moved if leaf.route for item in leaves_of(leaf.route.axis)}
        for leaf, axis in block:
            if axis < len(kept) and leaf in outer:
                outer[leaf] -= moved


def _chains(
    outer: dict[Leaf, set[Leaf]], rank: dict[Leaf, int], held: frozenset[Leaf]
) -> dict[Leaf, tuple[Leaf, ...]]:
    """Order the outer leaves of each free leaf into a chain, fixed ones first, outermost first.

    Of two leaves that could depend on each other the earlier is the outer one. Chains nest: the chain of
    each free member is the part before it, so that solvers may treat spaces as trees.
    """
    chains: dict[Leaf, tuple[Leaf, ...]] = {}
    for leaf in sorted(filter(_is_free, outer), key=lambda item: (len(outer[item] & held), rank[item])):
        above = [
            other
            for other in outer[leaf] & held
            if other.size > 1 and not (leaf in outer.get(other, ()) and rank[leaf] < rank[other])
        ]
        above.sort(key=lambda item: (len(chains.get(item, ())), rank[item]))
        fixed = tuple(other for other in above if other.fixed)
        nested: tuple[Leaf, ...] = ()
        for other in above:
            if other in chains and _continues(chains[other], nested, fixed):
                nested = (*chains[other], other)
        chains[leaf] = nested or fixed
    return chains


def _continues(chain: tuple[Leaf, ...], nested: tuple[Leaf, ...], fixed: tuple[Leaf, ...]) -> bool:
    """Return whether a leaf with this chain lies right below ``nested``, or starts a chain."""
    return chain == nested if nested else set(chain) <= set(fixed)
