"""Axis types: a small closed algebra that says which units an axis of a tensor enumerates.

===========================  ===================================================================
type                         the axis enumerates
===========================  ===================================================================
``Leaf(n)``                  the n units of one space; *free* until something fixes it
``Product(a, b, ...)``       the row-major product: hidden 768 is 12 heads times 64 dimensions
``Sum(a, b, ...)``           the concatenation: packed queries, keys and values
``Case(keys; t1, t2, ...)``  the type t_i wherever another axis is in the summand keys_i
``Constant(n)``              nothing: the tensor does not vary along this axis
===========================  ===================================================================

The types are nodes of one union-find: ``bound`` points from a node to the equal but more refined node
that replaced it, and :func:`resolve` follows it. Everything that reads types goes through the functions
here; only :class:`fxfusion.unify.Unifier` writes them.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_serials = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False)
class Reason:
    """Why an axis is fixed: where it happened, in one sentence, and what it follows from.

    Attributes
    ----------
    kind : str
        ``"input"``, ``"output"``, ``"order"`` (the operator gives positions a meaning), ``"constant"``
        (a constant varies along the axis), ``"clash"`` (two structures do not agree) or ``"no rule"``.
    node, operator, source : str
        The graph node, its operator and ``file:line`` in the model's code.
    message : str
        One sentence.
    because : Reason or None
        The reason that fixed the space with which this one was unified.
    """

    kind: str
    node: str
    operator: str
    source: str
    message: str
    because: Reason | None = None

    def chain(self) -> Iterator[Reason]:
        """Yield this reason, then what it follows from, down to the first cause."""
        reason: Reason | None = self
        while reason is not None:
            yield reason
            reason = reason.because


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """Every unit of an axis (a token) belongs to one unit of another axis (its expert), as an index says.

    Attributes
    ----------
    axis : Axis
        The axis whose units are chosen: the experts.
    key : str
        The index tensor that says which; two axes routed by different indices must not be confused.
    source : str
        The index tensor that was sorted to make the axis, if sorting made it.
    bag : str
        Names the index tensor's values whatever their order.
    rank : int
        How many axes the index tensor has: all of them together choose.
    """

    axis: Axis
    key: str
    source: str = ""
    bag: str = ""
    rank: int = 1


class Axis:
    """A node of the union-find; see the module's table for the five kinds."""

    __slots__ = ("bound", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.bound: Axis | None = None


class Leaf(Axis):
    """The units of one space.

    Attributes
    ----------
    fixed : Reason or None
        Why only the identity may act, or None while the space is free.
    cause : Reason or None
        The same, unless it was inherited from a leaf that it met or came from: a link leads there.
    merged : tuple of Leaf
        The fixed leaves that this one stands for as their product.
    groups : set of int
        One mark per product that the leaf is a factor of; leaves that share a mark lie in one axis of a
        parameter, so one may depend on a summand of the other.
    independent : tuple of Axis
        Summands on which the leaf is known not to depend.
    route : Route or None
        Which unit of another axis each unit belongs to, for tokens routed to experts.
    serial, sweep : int
        Creation order, and the sweep in which it was created.
    """

    __slots__ = ("cause", "fixed", "groups", "independent", "merged", "route", "serial", "sweep")

    def __init__(self, size: int, sweep: int = 0, fixed: Reason | None = None) -> None:
        super().__init__(size)
        self.fixed = self.cause = fixed
        self.merged: tuple[Leaf, ...] = ()
        self.groups: set[int] = set()
        self.independent: tuple[Axis, ...] = ()
        self.route: Route | None = None
        self.serial = next(_serials)
        self.sweep = sweep


class Link(NamedTuple):
    """A step of the proof why two leaves are what they are to each other.

    Leaves are the vertices and links the edges of a forest: the path between two leaves names the graph
    nodes that made one follow from the other (a proof-producing union-find).

    Attributes
    ----------
    first, second : Leaf
    relation : str
        ``"same"`` if both enumerate the same units, else what ``second`` is in the structure that
        ``first`` got: a ``"factor"``, a ``"part"`` or an ``"alternative"``.
    structure : str
        That structure, as text.
    where : Reason
        Names the graph node; its message says nothing.
    """

    first: Leaf
    second: Leaf
    relation: str
    structure: str
    where: Reason


class Constant(Axis):
    """No units: the tensor is the same all along the axis."""

    __slots__ = ()


class Product(Axis):
    """Row-major product of factors, outermost first. Build it with :func:`product`."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Axis]) -> None:
        size = 1
        for factor in factors:
            size *= factor.size
        super().__init__(size)
        self.factors = tuple(factors)


class Sum(Axis):
    """Concatenation of parts. Build it with :func:`concatenation`."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Axis]) -> None:
        super().__init__(sum(part.size for part in parts))
        self.parts = tuple(parts)


class Case(Axis):
    """One alternative for each summand (key) of another axis. Build it with :func:`case`."""

    __slots__ = ("alternatives", "keys")

    def __init__(self, keys: Sequence[Axis], alternatives: Sequence[Axis]) -> None:
        super().__init__(alternatives[0].size)
        self.keys = tuple(keys)
        self.alternatives = tuple(alternatives)


def resolve(axis: Axis) -> Axis:
    """Follow the union-find to the node that stands for ``axis`` now.

    Examples
    --------
    >>> leaf, outer, inner = Leaf(12), Leaf(3), Leaf(4)
    >>> leaf.bound = Product((outer, inner))
    >>> describe(leaf)
    '3*4'
    """
    root = axis
    while True:
        if root.bound is not None:
            root = root.bound
            continue
        if isinstance(root, Case):
            first = resolve(root.alternatives[0])
            if all(resolve(alternative) is first for alternative in root.alternatives[1:]):
                # Units that move alike in every summand must not be told apart by summand again.
                for leaf in leaves_of(first):
                    leaf.independent += root.keys
                root.bound = first
                continue
        break
    while axis.bound is not None and axis is not root:
        axis.bound, axis = root, axis.bound
    return root


def product(factors: Iterable[Axis]) -> Axis:
    """Return the normal form of a row-major product: flat, without factors of size one.

    Adjacent constants merge: they have no identity to keep.
    """
    flat: list[Axis] = []
    for factor in factors:
        for item in factors_of(factor):
            last = flat[-1] if flat else None
            if isinstance(item, Constant) and isinstance(last, Constant):
                flat[-1] = Constant(last.size * item.size)
            else:
                flat.append(item)
    if not flat:
        return Constant(1)
    return flat[0] if len(flat) == 1 else Product(flat)


def merge_fixed(outer: Axis, inner: Axis) -> Leaf | None:
    """Return the product of two fixed leaves as one fixed leaf, which may be split in any way, or None."""
    outer, inner = resolve(outer), resolve(inner)
    if not (isinstance(outer, Leaf) and isinstance(inner, Leaf) and outer.fixed and inner.fixed):
        return None
    # Made anew at every sweep and fixed anyway: nothing that happens to it is news.
    merged = Leaf(outer.size * inner.size, sys.maxsize)
    merged.fixed, merged.merged = outer.fixed, (outer, inner)
    return merged


def concatenation(parts: Iterable[Axis]) -> Axis:
    """Return the normal form of a concatenation: flat, without empty parts."""
    flat = [item for part in parts for item in parts_of(part) if item.size]
    return flat[0] if len(flat) == 1 else Sum(flat)


def case(keys: Sequence[Axis], alternatives: Sequence[Axis]) -> Axis:
    """Return the alternatives keyed by summand, or the alternative itself if there is only one."""
    resolved = [resolve(alternative) for alternative in alternatives]
    if all(alternative is resolved[0] for alternative in resolved):
        return resolved[0]
    if all(isinstance(alternative, Constant) for alternative in resolved):
        return Constant(resolved[0].size)
    return Case(keys, resolved)


def factors_of(axis: Axis) -> list[Axis]:
    """Return the factors of an axis, outermost first; an axis of size one has none."""
    axis = resolve(axis)
    if isinstance(axis, Product):
        return [item for factor in axis.factors for item in factors_of(factor)]
    return [axis] if axis.size != 1 else []


def parts_of(axis: Axis) -> list[Axis]:
    """Return the summands of an axis; an axis that is no concatenation is its own only part."""
    axis = resolve(axis)
    if isinstance(axis, Sum):
        return [item for part in axis.parts for item in parts_of(part)]
    return [axis]


def leaves_of(axis: Axis) -> Iterator[Leaf]:
    """Yield every leaf below an axis, with repetition, alternatives included."""
    pending = [axis]
    while pending:
        node = resolve(pending.pop())
        if isinstance(node, Leaf):
            yield node
        else:
            pending += reversed(children_of(node))


def children_of(axis: Axis) -> tuple[Axis, ...]:
    """Return what a resolved node is made of: factors, parts or alternatives."""
    if isinstance(axis, Product):
        return axis.factors
    if isinstance(axis, Sum):
        return axis.parts
    if isinstance(axis, Case):
        return axis.alternatives
    return ()


def atoms_of(axis: Axis) -> frozenset[Leaf]:
    """Return the set of leaves below an axis: the identity of a summand that others depend on."""
    return frozenset(leaves_of(axis))


def is_free(axis: Axis) -> bool:
    """Return whether a space of at least two units that may be permuted lies below the axis."""
    return any(leaf.fixed is None and leaf.size > 1 for leaf in leaves_of(axis))


def describe(axis: Axis) -> str:
    """Write a type as text: ``12*64`` (product), ``64+64`` (sum), ``=5`` (constant), ``7!`` (fixed)."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        return f"{axis.size}!" if axis.fixed else str(axis.size)
    if isinstance(axis, Constant):
        return f"={axis.size}"
    inner = [describe(child) for child in children_of(axis)]
    if isinstance(axis, Product):
        return "*".join(f"({text})" if "+" in text else text for text in inner)
    return "+".join(inner) if isinstance(axis, Sum) else "{" + "|".join(inner) + "}"
