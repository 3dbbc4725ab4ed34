"""Unification of axis types: the one place where types are refined.

Four primitives carry all operator rules: :meth:`Unifier.unify`, :meth:`Unifier.split`,
:meth:`Unifier.cut` and :meth:`Unifier.regroup`. Two types unify to their common refinement; where there
is none, both are fixed and the clash is recorded with the node that caused it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from fxfusion.axes import (
    Axis,
    Case,
    Constant,
    Leaf,
    Link,
    Product,
    Reason,
    Sum,
    atoms_of,
    case,
    children_of,
    concatenation,
    describe,
    factors_of,
    leaves_of,
    merge_fixed,
    parts_of,
    product,
    resolve,
)
from fxfusion.layout import tensor_blocks

_RELATIONS: dict[type, str] = {Product: "factor", Sum: "part", Case: "alternative"}


class _ClashError(Exception):
    """Two structures have no common refinement; caught where both are at hand."""


class Unifier:
    """A union-find over axis types.

    Parameters
    ----------
    reason : callable ``(kind, message, because) -> Reason``, optional
        Makes the reason recorded when a space is fixed; it knows the graph node being typed.

    Attributes
    ----------
    links : list of Link
        What was unified with, or refined to, what, and where: from it :mod:`fxfusion.explain` finds the
        way from a fixed axis to the first cause.

    Examples
    --------
    A packed projection viewed as (3, heads, head_dim), whose queries are then selected:

    >>> from fxfusion.axes import describe
    >>> unifier, packed = Unifier(), Leaf(3 * 4 * 16)
    >>> three, heads, dimension = unifier.regroup([packed], [3, 4, 16])
    >>> queries = unifier.narrow([three, heads, dimension], 0, 0, 1)
    >>> [describe(axis) for axis in queries], describe(packed)
    (['1', '4', '16'], '(1+2)*{4|4}*{16|16}')
    """

    def __init__(self, reason: Callable[[str, str, Reason | None], Reason] | None = None) -> None:
        self.sweep = 0
        self.changes = 0
        self.links: list[Link] = []
        self._reason = reason or (lambda kind, message, because: Reason(kind, "", "", "", message, because))
        self._groups = itertools.count()
        self._cases = False

    # -- leaves ---------------------------------------------------------------------------------

    def leaf(self, size: int, fixed: Reason | None = None) -> Leaf:
        """Return a new space of ``size`` units."""
        return Leaf(size, self.sweep, fixed)

    def fix(self, axis: Axis, kind: str, message: str, because: Reason | None = None) -> None:
        """Let only the identity act on every space below an axis."""
        reason = None
        for leaf in leaves_of(axis):
            if leaf.fixed is None:
                reason = reason or self._reason(kind, message, because)
                leaf.fixed = reason
                leaf.cause = reason
                self._changed(leaf)

    def _changed(self, leaf: Leaf) -> None:
        # What was created in this sweep is created anew in the next: only older leaves carry knowledge.
        if leaf.sweep < self.sweep:
            self.changes += 1

    def _inherit(self, leaf: Leaf, descendants: Sequence[Leaf]) -> None:
        for descendant in descendants:
            descendant.groups |= leaf.groups
            descendant.independent += leaf.independent
        if leaf.fixed:
            for descendant in descendants:
                descendant.fixed = descendant.fixed or leaf.fixed

    def _link(self, leaf: Leaf, others: Sequence[Leaf], structure: Axis | None = None) -> None:
        where = self._reason("link", "", None)
        relation = _RELATIONS.get(type(structure), "same")
        text = "" if structure is None else _text(structure)
        self.links += [Link(leaf, other, relation, text, where) for other in others]

    def _bind(self, leaf: Leaf, other: Axis, origins: tuple[Axis, Axis] | None = None) -> Axis:
        """Replace a leaf by another axis; ``origins`` are the nodes at hand, which led to the two."""
        first, second = origins or (leaf, other)
        first = first if isinstance(first, Leaf) else leaf
        if isinstance(other, Leaf):
            # Two leaves that are fixed already have a way each to a first cause, and need no other; that
            # they are one is no news.
            known = bool(leaf.fixed and other.fixed)
            if not known:
                self._link(first, [second if isinstance(second, Leaf) else other])
            younger, older = (leaf, other) if leaf.serial > other.serial else (other, leaf)
            if younger.fixed and not older.fixed:
                self.fix(older, younger.fixed.kind, "it meets an axis that is fixed", younger.fixed)
                older.cause = None
            older.groups |= younger.groups
            if older.route is not younger.route:  # which units its own belong to is no longer known
                older.route = None
            older.independent += younger.independent
            younger.bound = older
            if not known:
                self._changed(younger)
            return older
        if leaf in atoms_of(other):
            self.collapse(other)
            return resolve(leaf)
        if isinstance(other, Case) and _is_independent(leaf, other.keys):
            joined: Axis = leaf
            for alternative in other.alternatives:
                joined = self._unify(joined, alternative)
            return joined
        structure = self._materialise(other)
        descendants = list(dict.fromkeys(leaves_of(structure)))
        self._link(first, descendants, structure)
        leaf.bound = structure
        if not leaf.fixed or any(descendant.fixed is None for descendant in descendants):
            self._changed(leaf)
        if isinstance(structure, Product):
            leaf.groups.add(next(self._groups))
        self._inherit(leaf, descendants)
        if leaf.fixed:
            self.fix(structure, leaf.fixed.kind, "it meets an axis that is fixed", leaf.fixed)
        return structure

    def _materialise(self, axis: Axis) -> Axis:
        """Replace constants by new spaces: what one tensor repeats, another may vary along."""
        axis = resolve(axis)
        if isinstance(axis, Constant):
            return self.leaf(axis.size)
        if isinstance(axis, Leaf) or not any(has_constant(child) for child in children_of(axis)):
            return axis
        children = [self._materialise(child) for child in children_of(axis)]
        if isinstance(axis, Product):
            return product(children)
        return concatenation(children) if isinstance(axis, Sum) else case(axis.keys, children)  # type: ignore[attr-defined]

    # -- unification ----------------------------------------------------------------------------

    def unify(self, left: Axis, right: Axis) -> Axis:
        """Make two axes enumerate the same units; return the type of a tensor that varies along either."""
        origins = left, right
        left, right = resolve(left), resolve(right)
        if left is right or isinstance(right, Constant):
            return left
        if isinstance(left, Constant):
            return right
        try:
            return self._unify(*origins)
        except _ClashError:
            return self.clash([left, right])

    def clash(self, axes: Sequence[Axis], message: str = "") -> Axis:
        """Fix axes whose structures do not agree."""
        message = message or f"{' and '.join(map(_text, axes))} have no common refinement"
        for axis in axes:
            self.fix(axis, "clash", message)
        return self.leaf(axes[0].size, self._reason("clash", message, None))

    def _unify(self, left: Axis, right: Axis) -> Axis:
        origins = left, right
        left, right = resolve(left), resolve(right)
        if left is right or isinstance(right, Constant):
            return left
        if isinstance(left, Constant):
            return right
        if left.size != right.size:
            raise _ClashError
        if isinstance(left, Leaf):
            return self._bind(left, right, origins)
        if isinstance(right, Leaf):
            return self._bind(right, left, origins[::-1])
        if isinstance(left, Case):
            return self._unify_case(left, right)
        if isinstance(right, Case):
            return self._unify_case(right, left)
        if isinstance(left, Sum) and isinstance(right, Sum):
            return self._unify_sums(left, right)
        return self._unify_products(left, right)

    def _unify_case(self, left: Case, right: Axis) -> Axis:
        joined = [
            self._unify(alternative, self._restrict(right, atoms_of(key)))
            for key, alternative in zip(left.keys, left.alternatives, strict=True)
        ]
        return case(left.keys, joined)

    def _unify_products(self, left: Axis, right: Axis) -> Axis:
        """Walk both factor lists outermost first, splitting the larger factor at the smaller."""
        first, second, joined = factors_of(left), factors_of(right), []
        while first and second:
            _align(first, second)
            a, b = first.pop(0), second.pop(0)
            if a.size > b.size:
                a, rest = self.split(a, b.size)
                first[:0] = factors_of(rest)
            elif b.size > a.size:
                b, rest = self.split(b, a.size)
                second[:0] = factors_of(rest)
            joined.append(self._unify(a, b))
        return product(joined)

    def _unify_sums(self, left: Axis, right: Axis) -> Axis:
        """Go from one common boundary of both sums to the next; what does not agree is fixed up to there."""
        joined = []
        for first, second in _segments(parts_of(left), parts_of(right)):
            try:
                joined.append(self._unify_parts(list(first), list(second)))
            except _ClashError:
                joined.append(self.clash([concatenation(first), concatenation(second)]))
        return concatenation(joined)

    def _unify_parts(self, first: list[Axis], second: list[Axis]) -> Axis:
        """Walk both part lists, cutting the larger part at the smaller."""
        joined = []
        while first and second:
            a, b = first.pop(0), second.pop(0)
            if a.size > b.size:
                a, rest = self._cut(a, b.size)
                first[:0] = parts_of(rest)
            elif b.size > a.size:
                b, rest = self._cut(b, a.size)
                second[:0] = parts_of(rest)
            joined.append(self._unify(a, b))
        return concatenation(joined)

    # -- splitting a product --------------------------------------------------------------------

    def split(self, axis: Axis, outer: int) -> tuple[Axis, Axis]:
        """Factor an axis into ``outer`` times the rest, refining it if need be."""
        axis = resolve(axis)
        inner, remainder = divmod(axis.size, outer)
        if remainder:
            raise _ClashError
        if outer == 1:
            return Constant(1), axis
        if inner == 1:
            return axis, Constant(1)
        if isinstance(axis, Constant):
            return Constant(outer), Constant(inner)
        if isinstance(axis, Leaf) and axis.fixed and axis.route:  # elsewhere it stays one axis
            return self.leaf(outer, axis.fixed), self.leaf(inner, axis.fixed)
        if isinstance(axis, Leaf):
            factors = (self.leaf(outer), self.leaf(inner))
            self._bind(axis, Product(factors))
            return factors
        if isinstance(axis, Case):
            pairs = [self.split(alternative, outer) for alternative in axis.alternatives]
            return case(axis.keys, [a for a, _ in pairs]), case(axis.keys, [b for _, b in pairs])
        if isinstance(axis, Sum):
            return self._split_sum(axis, inner)
        return self._split_factors(factors_of(axis), outer)

    def _split_factors(self, factors: list[Axis], outer: int) -> tuple[Axis, Axis]:
        taken: list[Axis] = []
        while outer > 1:
            while math.gcd(factors[0].size, outer) not in {factors[0].size, outer}:
                _merge_heads(factors)
            factor = factors.pop(0)
            share = math.gcd(factor.size, outer)
            if share < factor.size:
                factor, rest = self.split(factor, share)
                factors[:0] = factors_of(rest)
            taken.append(factor)
            outer //= share
        return product(taken), product(factors)

    def _split_sum(self, axis: Sum, inner: int) -> tuple[Axis, Axis]:
        """Distribute: parts q, k, v of equal inner size are (1+1+1) times {q|k|v}."""
        parts = [self._materialise(part) for part in parts_of(axis)]
        if any(part.size % inner for part in parts):
            raise _ClashError
        pairs = [self.split(part, part.size // inner) for part in parts]
        keys = [self.leaf(1) if outer.size == 1 else outer for outer, _ in pairs]
        outer, rest = Sum(keys), case(keys, [inner_part for _, inner_part in pairs])
        self._cases = True
        axis.bound = Product((outer, rest))
        return outer, rest

    # -- cutting a sum --------------------------------------------------------------------------

    def cut(self, axis: Axis, position: int) -> tuple[Axis, Axis]:
        """Part an axis in two at ``position``, refining it if need be."""
        try:
            return self._cut(axis, position)
        except _ClashError:
            fixed = self.clash([axis], f"a cut at {position} does not respect the structure {_text(axis)}")
            assert isinstance(fixed, Leaf)
            return self.leaf(position, fixed.fixed), self.leaf(axis.size - position, fixed.fixed)

    def _cut(self, axis: Axis, position: int) -> tuple[Axis, Axis]:
        axis = resolve(axis)
        rest = axis.size - position
        if not position or not rest:  # a group without tokens: there is nothing to refine
            return (axis, Constant(0)) if position else (Constant(0), axis)
        if isinstance(axis, Constant):
            return Constant(position), Constant(rest)
        if isinstance(axis, Leaf) and axis.fixed and axis.route:  # elsewhere it stays one axis
            return self.leaf(position, axis.fixed), self.leaf(rest, axis.fixed)
        if isinstance(axis, Leaf):
            pair = (self.leaf(position), self.leaf(rest))
            self._bind(axis, Sum(pair))
            return pair
        if isinstance(axis, Case):
            pairs = [self._cut(alternative, position) for alternative in axis.alternatives]
            return case(axis.keys, [a for a, _ in pairs]), case(axis.keys, [b for _, b in pairs])
        if isinstance(axis, Sum):
            return self._cut_parts(parts_of(axis), position)
        return self._cut_product(factors_of(axis), position)

    def _cut_parts(self, parts: list[Axis], position: int) -> tuple[Axis, Axis]:
        taken: list[Axis] = []
        while position:
            part = parts.pop(0)
            if part.size > position:
                part, rest = self._cut(part, position)
                parts[:0] = parts_of(rest)
            taken.append(part)
            position -= part.size
        return concatenation(taken), concatenation(parts)

    def _cut_product(self, factors: list[Axis], position: int) -> tuple[Axis, Axis]:
        outer, inner = factors[0], factors[1:]
        size = math.prod(factor.size for factor in inner)
        if position % size:
            raise _ClashError
        left, right = self._cut(outer, position // size)
        groups = self._groups_of(outer)
        return (
            product([left, *(self._restrict(factor, atoms_of(left), outer, groups) for factor in inner)]),
            product([right, *(self._restrict(factor, atoms_of(right), outer, groups) for factor in inner)]),
        )

    def narrow(self, axes: Sequence[Axis], axis: int, start: int, stop: int) -> list[Axis]:
        """Return the types of ``tensor[..., start:stop, ...]``.

        Axes that lie in one parameter axis with the cut one may from here on differ from summand to
        summand: packed queries, keys and values each get heads of their own.
        """
        whole = resolve(axes[axis])
        if start == 0 and stop == whole.size:
            return list(axes)
        kept: Axis = whole
        if stop < whole.size:
            kept, _ = self.cut(kept, stop)
        if start > 0:
            _, kept = self.cut(kept, start)
        narrowed = list(axes)
        narrowed[axis] = kept
        whole = resolve(whole)
        if isinstance(whole, Sum):
            atoms, groups = atoms_of(kept), self._groups_of(whole)
            for index, other in enumerate(axes):
                if index != axis:
                    narrowed[index] = self._restrict(other, atoms, whole, groups)
        return narrowed

    # -- dependence on a summand ----------------------------------------------------------------

    def _groups_of(self, axis: Axis) -> frozenset[int]:
        return frozenset(group for leaf in leaves_of(axis) for group in leaf.groups)

    def _restrict(
        self,
        axis: Axis,
        kept: frozenset[Leaf],
        whole: Axis | None = None,
        groups: frozenset[int] = frozenset(),
    ) -> Axis:
        """Return the type of an axis where another axis is confined to the summands ``kept``.

        With ``whole`` (the other axis) given, a free leaf that may depend on its summands is refined to a
        case; without, only cases that exist are resolved.
        """
        axis = resolve(axis)
        if isinstance(axis, Leaf):
            if whole is not None and self._may_depend(axis, whole, groups):
                return self._restrict(self._make_case(axis, whole), kept)
            return axis
        if isinstance(axis, Case):
            return self._restrict_case(axis, kept, whole, groups)
        if isinstance(axis, Product):
            return product(self._restrict(factor, kept, whole, groups) for factor in factors_of(axis))
        if isinstance(axis, Sum):
            return concatenation(self._restrict(part, kept, whole, groups) for part in parts_of(axis))
        return axis

    def _restrict_case(
        self, axis: Case, kept: frozenset[Leaf], whole: Axis | None, groups: frozenset[int]
    ) -> Axis:
        entries = list(zip(axis.keys, axis.alternatives, strict=True))
        chosen = [(key, alternative) for key, alternative in entries if atoms_of(key) & kept]
        # Within one summand, only what that summand is made of can be told apart further.
        same = bool(chosen) and whole is not None
        restricted = [
            (key, self._restrict(item, kept, key if same else whole, groups))
            for key, item in chosen or entries
        ]
        if len(restricted) == 1:
            return resolve(restricted[0][1])
        return case([key for key, _ in restricted], [item for _, item in restricted])

    def _may_depend(self, leaf: Leaf, whole: Axis, groups: frozenset[int]) -> bool:
        if leaf.fixed or not leaf.groups & groups or not isinstance(resolve(whole), Sum):
            return False
        return leaf not in atoms_of(whole) and not _is_independent(leaf, [whole])

    def _make_case(self, leaf: Leaf, whole: Axis) -> Axis:
        keys = parts_of(whole)
        alternatives = [self.leaf(leaf.size) for _ in keys]
        self._inherit(leaf, alternatives)
        leaf.bound = Case(keys, alternatives)
        self._link(leaf, alternatives, leaf.bound)
        self._cases = True
        self._changed(leaf)
        return leaf.bound

    def keyed(self, keys: Sequence[Axis], alternatives: Sequence[Axis]) -> Axis:
        """Return the type of an axis that is another one in each of some summands."""
        self._cases = True
        return case(keys, alternatives)

    def collapse(self, axis: Axis) -> None:
        """Unify the alternatives of every case below an axis and remember that they do not differ."""
        for found in list(_cases_of(axis)):
            self._collapse(found)

    def _collapse(self, found: Case) -> None:
        joined: Axis = found.alternatives[0]
        for alternative in found.alternatives[1:]:
            joined = self.unify(joined, alternative)
        for leaf in atoms_of(joined):
            leaf.independent += found.keys
        if resolve(found) is found:  # alternatives of equal structure are equal, not identical
            found.bound = joined

    def seal(self, axes: Sequence[Axis]) -> None:
        """Collapse every case in a tensor's axes of which the tensor does not say the summand."""
        if not self._cases:
            return
        found = [item for axis in axes for item in _cases_of(axis)]
        if not found:
            return
        present = frozenset[Leaf]().union(*(_summands_of(axis) for axis in axes))
        for item in found:
            if not all(atoms_of(key) <= present for key in item.keys):
                self._collapse(item)
        if not _tiles(axes):  # beside some summands a case says nothing, or beside two of them
            for axis in axes:
                self.collapse(axis)

    # -- views ----------------------------------------------------------------------------------

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Return the types of a row-major view of ``axes`` with new ``sizes``."""
        pending = [factor for axis in axes for factor in factors_of(axis)]
        regrouped: list[Axis] = []
        try:
            for size in sizes:
                taken, rest = self._split_factors(pending, size)
                pending = factors_of(rest)
                regrouped.append(taken)
            if pending:
                raise _ClashError
        except (_ClashError, IndexError):
            structures = ", ".join(map(_text, axes))
            message = f"a view of [{structures}] as {list(sizes)} does not respect the structure"
            for axis in axes:
                self.fix(axis, "clash", message)
            reason = self._reason("clash", message, None)
            return [Constant(1) if size == 1 else self.leaf(size, reason) for size in sizes]
        return regrouped


def _is_independent(leaf: Leaf, axes: Sequence[Axis]) -> bool:
    """Return whether a leaf is known not to differ from summand to summand of some axes."""
    atoms = frozenset[Leaf]().union(*map(atoms_of, axes))
    return any(atoms_of(key) & atoms for key in leaf.independent)


def _align(first: list[Axis], second: list[Axis]) -> None:
    """Merge fixed leaves at the heads of two factor lists until one size divides the other."""
    while first[0].size % second[0].size and second[0].size % first[0].size:
        _merge_heads(first if _mergeable(first) else second)


def _mergeable(factors: Sequence[Axis]) -> bool:
    return len(factors) > 1 and merge_fixed(factors[0], factors[1]) is not None


def _segments(first: Sequence[Axis], second: Sequence[Axis]) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Yield stretches of two sums of one size that end at the same place."""
    ends = [set(itertools.accumulate(part.size for part in parts)) for parts in (first, second)]
    common = ends[0] & ends[1]
    stretches: list[list[list[Axis]]] = []
    for parts in (first, second):
        place = 0
        found: list[list[Axis]] = [[]]
        for part in parts:
            found[-1].append(part)
            place += part.size
            if place in common:
                found.append([])
        stretches.append(found[:-1])
    yield from zip(*stretches, strict=True)


def _merge_heads(factors: list[Axis]) -> None:
    """Replace the first two factors, both fixed, by one that may be split elsewhere."""
    merged = merge_fixed(factors[0], factors[1]) if len(factors) > 1 else None
    if merged is None:
        raise _ClashError
    factors[:2] = [merged]


def _text(axis: Axis) -> str:
    """Write the structure alone, whatever is fixed in it."""
    return describe(axis).replace("!", "")


def has_constant(axis: Axis) -> bool:
    """Return whether a tensor repeats along an axis, wholly or within some of its factors or parts."""
    axis = resolve(axis)
    return isinstance(axis, Constant) or any(has_constant(child) for child in children_of(axis))


def _cases_of(axis: Axis) -> list[Case]:
    axis = resolve(axis)
    found = [item for child in children_of(axis) for item in _cases_of(child)]
    return [*found, axis] if isinstance(axis, Case) else found


def _tiles(axes: Sequence[Axis]) -> bool:
    """Return whether every element of a tensor lies in one block: whether every case is decided."""
    volume = sum(
        math.prod(size for piece in pieces for _, size, _ in piece.factors) for pieces in tensor_blocks(axes)
    )
    return volume == math.prod(axis.size for axis in axes)


def _summands_of(axis: Axis) -> frozenset[Leaf]:
    axis = resolve(axis)
    below = [_summands_of(child) for child in children_of(axis)]
    own = atoms_of(axis) if isinstance(axis, Sum) else frozenset[Leaf]()
    return own.union(*below)
