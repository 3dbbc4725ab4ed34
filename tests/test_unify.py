"""Unification: common refinements, cuts, views, cases, clashes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.axes import (
    Axis,
    Case,
    Constant,
    Leaf,
    Product,
    Reason,
    atoms_of,
    concatenation,
    describe,
    factors_of,
    is_free,
    leaves_of,
    parts_of,
    product,
    resolve,
)
from fxfusion.unify import Unifier

FAST = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=4)


def unify_all(*texts: Sequence[int], way: str = "product") -> tuple[Unifier, list[Axis]]:
    """Return axes made of leaves of given sizes."""
    build = product if way == "product" else concatenation
    return Unifier(), [build([Leaf(size) for size in sizes]) for sizes in texts]


def grouped(draw: st.DrawFn, primes: Sequence[int]) -> list[int]:
    sizes, current = [], 1
    for prime in primes:
        current *= prime
        if draw(st.booleans()):
            sizes.append(current)
            current = 1
    return [*sizes, current] if current > 1 else sizes


@st.composite
def factorings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw two groupings of one list of primes: they have a common refinement."""
    primes = draw(st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=5))
    return grouped(draw, primes), grouped(draw, primes)


def cumulative(sizes: Sequence[int], way: str) -> set[int]:
    total, found = 1 if way == "product" else 0, set()
    for size in sizes:
        total = total * size if way == "product" else total + size
        found.add(total)
    return found


# -- leaves and constants -------------------------------------------------------------------------


def test_leaves_become_one() -> None:
    unifier, (a, b) = unify_all([5], [5])
    assert resolve(unifier.unify(a, b)) is resolve(a) is resolve(b)


def test_constant_never_binds() -> None:
    unifier, (a, b) = unify_all([6], [2, 3])
    for axis in (a, b):
        assert unifier.unify(axis, Constant(6)) is axis
        assert unifier.unify(Constant(6), axis) is axis
    assert describe(a) == "6"
    assert describe(b) == "2*3"
    assert not unifier.changes


def test_constant_inside_a_structure_becomes_a_space_of_the_other_side() -> None:
    unifier = Unifier()
    repeated, queries = product([Leaf(2), Constant(3)]), Leaf(6)
    unifier.unify(repeated, queries)
    assert describe(queries) == "2*3"
    assert describe(repeated) == "2*=3"
    assert resolve(factors_of(queries)[0]) is resolve(factors_of(repeated)[0])


# -- common refinement ----------------------------------------------------------------------------


@FAST
@given(factorings())
def test_products_meet_in_the_common_refinement(pair: tuple[list[int], list[int]]) -> None:
    unifier, (left, right) = unify_all(*pair)
    joined = unifier.unify(left, right)
    expected = sorted(cumulative(pair[0], "product") | cumulative(pair[1], "product"))
    sizes = [high // low for low, high in zip([1, *expected], expected, strict=False)]
    for axis in (left, right, joined):
        assert [factor.size for factor in factors_of(axis)] == sizes
        assert all(is_free(factor) for factor in factors_of(axis))
    assert factors_of(left) == factors_of(right) == factors_of(joined)


@FAST
@given(SIZES, SIZES)
def test_sums_meet_in_the_common_refinement(first: list[int], second: list[int]) -> None:
    short = sum(first) - sum(second)
    first, second = [*first, max(-short, 0)], [*second, max(short, 0)]
    unifier, (left, right) = unify_all(first, second, way="sum")
    joined = unifier.unify(left, right)
    expected = sorted((cumulative(first, "sum") | cumulative(second, "sum")) - {0})
    sizes = [high - low for low, high in zip([0, *expected], expected, strict=False)]
    for axis in (left, right, joined):
        assert [part.size for part in parts_of(axis)] == sizes
    assert parts_of(left) == parts_of(right)


@FAST
@given(factorings(), st.booleans())
def test_unification_is_symmetric_and_idempotent(pair: tuple[list[int], list[int]], swap: bool) -> None:
    unifier, (left, right) = unify_all(*pair)
    unifier.unify(*((right, left) if swap else (left, right)))
    text = describe(left), describe(right)
    assert text[0] == text[1]
    unifier.sweep += 1
    unifier.changes = 0
    unifier.unify(right, left)
    assert (describe(left), describe(right)) == text
    assert unifier.changes == 0


@FAST
@given(factorings(), st.data())
def test_order_of_unification_does_not_matter(pair: tuple[list[int], list[int]], data: st.DataObject) -> None:
    whole = [math.prod(pair[0])]
    steps = data.draw(st.permutations([(0, 1), (1, 2), (0, 2)]))
    unifier, axes = unify_all(whole, *pair)
    for i, j in steps:
        unifier.unify(axes[i], axes[j])
    reference, again = unify_all(*pair)
    reference.unify(*again)
    assert {describe(axis) for axis in axes} == {describe(again[0])}


def test_a_product_meets_a_sum_of_equal_inner_size() -> None:
    unifier = Unifier()
    packed = concatenation([Leaf(6), Leaf(6)])
    other = product([Leaf(2), Leaf(6)])
    unifier.unify(packed, other)
    assert describe(packed) == describe(other)
    assert all(is_free(axis) for axis in (packed, other))


# -- fixing ---------------------------------------------------------------------------------------


def test_clash_fixes_both_with_a_reason() -> None:
    unifier, (left, right) = unify_all([2, 3], [3, 2])
    joined = unifier.unify(left, right)
    for axis in (left, right, joined):
        assert not is_free(axis)
        assert {leaf.fixed.kind for leaf in leaves_of(axis) if leaf.fixed} == {"clash"}
    reason = next(leaves_of(left)).fixed
    assert reason is not None
    assert "common refinement" in reason.message


def test_clash_of_sizes_fixes_both() -> None:
    unifier, (left, right) = unify_all([5], [7])
    unifier.unify(left, right)
    assert not is_free(left)
    assert not is_free(right)


def test_fixing_propagates_with_its_chain_of_reasons() -> None:
    where = ["input"]
    unifier = Unifier(lambda kind, message, because: Reason(kind, where[0], "", "", message, because))
    axes = [Leaf(6) for _ in range(3)]
    unifier.fix(axes[2], "order", "positions along it have a meaning")
    for node, (i, j) in {"first": (1, 2), "second": (0, 1)}.items():
        where[0] = node
        unifier.unify(axes[i], axes[j])
    reason = next(leaves_of(axes[0])).fixed
    assert reason is not None
    chain = list(reason.chain())
    assert [item.node for item in chain] == ["second", "first", "input"]
    assert {item.kind for item in chain} == {"order"}
    assert chain[-1].message == "positions along it have a meaning"


@FAST
@given(SIZES)
def test_a_fixed_leaf_fixes_the_structure_that_it_meets(sizes: list[int]) -> None:
    unifier, (leaf, other) = unify_all([math.prod(sizes)], sizes)
    unifier.fix(leaf, "order", "because")
    unifier.unify(leaf, other)
    assert not is_free(other)
    unifier, (leaf, other) = unify_all([math.prod(sizes)], sizes)
    unifier.fix(other, "order", "because")
    unifier.unify(leaf, other)
    assert not is_free(leaf)


def test_fixing_keeps_the_first_reason() -> None:
    unifier, (axis,) = unify_all([2, 3])
    unifier.fix(axis, "order", "first")
    unifier.fix(axis, "order", "second")
    assert {leaf.fixed.message for leaf in leaves_of(axis) if leaf.fixed} == {"first"}


# -- occurs check ---------------------------------------------------------------------------------


def test_occurs_check_does_not_loop() -> None:
    unifier = Unifier()
    packed = Leaf(12)
    three, rest = unifier.regroup([packed], [3, 4])
    first = unifier.narrow([three, rest], 0, 0, 1)[1]
    inner = next(leaves_of(first))
    unifier.unify(inner, rest)  # one alternative of a case meets the case that it is part of
    assert describe(packed) == "(1+2)*4"


# -- splitting and cutting ------------------------------------------------------------------------


@FAST
@given(SIZES, st.data())
def test_split_has_the_sizes_asked_for(sizes: list[int], data: st.DataObject) -> None:
    unifier, (axis,) = unify_all(sizes)
    count = data.draw(st.integers(0, len(sizes)))
    outer, inner = unifier.split(axis, math.prod(sizes[:count]))
    assert (outer.size, inner.size) == (math.prod(sizes[:count]), math.prod(sizes[count:]))
    assert describe(product([outer, inner])) == describe(axis)


@FAST
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_cut_has_the_sizes_asked_for(sizes: list[int], data: st.DataObject) -> None:
    unifier, (axis,) = unify_all(sizes, way="sum")
    position = data.draw(st.integers(1, axis.size)) if axis.size > 1 else 1
    left, right = (axis, Constant(0)) if position == axis.size else unifier.cut(axis, position)
    assert (left.size, right.size) == (position, axis.size - position)
    assert describe(concatenation([left, right])) == describe(axis)


def test_cut_of_a_product_at_whole_outer_units() -> None:
    unifier, (axis,) = unify_all([6, 4])
    left, right = unifier.cut(axis, 8)
    assert describe(left) == "2*4"
    assert describe(right) == "4*4"
    # All rows of the product held one inner space, so both sides still do.
    assert factors_of(left)[1] is factors_of(right)[1]


def test_cut_inside_an_outer_unit_clashes() -> None:
    unifier, (axis,) = unify_all([6, 4])
    left, right = unifier.cut(axis, 9)
    assert (left.size, right.size) == (9, 15)
    assert not any(map(is_free, (axis, left, right)))


def test_cut_of_a_constant_is_constant() -> None:
    assert [describe(part) for part in Unifier().cut(Constant(5), 2)] == ["=2", "=3"]


# -- views ----------------------------------------------------------------------------------------


@FAST
@given(factorings())
def test_regroup_round_trips(pair: tuple[list[int], list[int]]) -> None:
    unifier = Unifier()
    axes: list[Axis] = [Leaf(size) for size in pair[0]]
    there = unifier.regroup(axes, pair[1])
    assert [axis.size for axis in there] == pair[1]
    back = unifier.regroup(there, pair[0])
    assert [describe(axis) for axis in back] == [describe(axis) for axis in axes]
    assert all(is_free(axis) for axis in axes)
    again = unifier.regroup(axes, pair[1])
    assert [atoms_of(axis) for axis in again] == [atoms_of(axis) for axis in there]


@FAST
@given(factorings(), st.data())
def test_axes_of_size_one_come_and_go(pair: tuple[list[int], list[int]], data: st.DataObject) -> None:
    unifier = Unifier()
    axes: list[Axis] = [Leaf(size) for size in pair[0]]
    place = data.draw(st.integers(0, len(pair[1])))
    sizes = [*pair[1][:place], 1, *pair[1][place:]]
    there = unifier.regroup(axes, sizes)
    assert [axis.size for axis in there] == sizes
    assert isinstance(there[place], Constant)


def test_view_across_a_boundary_fixes() -> None:
    unifier = Unifier()
    axes: list[Axis] = [Leaf(6), Leaf(4), Leaf(5)]
    there = unifier.regroup(axes, [4, 6, 5])
    assert [axis.size for axis in there] == [4, 6, 5]
    assert not any(map(is_free, [*axes[:2], *there[:2]]))


def test_view_of_a_repeated_axis_stays_constant() -> None:
    there = Unifier().regroup([Leaf(2), Constant(6)], [2, 3, 2])
    assert [describe(axis) for axis in there] == ["2", "=3", "=2"]


# -- packed projections ---------------------------------------------------------------------------


def packed(parts: int = 3, heads: int = 4, size: int = 5) -> tuple[Unifier, Axis, list[list[Axis]]]:
    """Return a packed projection and its parts, each selected from a view as (parts, heads, size)."""
    unifier = Unifier()
    axis = Leaf(parts * heads * size)
    view = unifier.regroup([axis], [parts, heads, size])
    return unifier, axis, [unifier.narrow(view, 0, index, index + 1)[1:] for index in range(parts)]


def spaces(axis: Axis) -> list[int]:
    """Return how many spaces each factor of an axis is made of, over all summands."""
    return [len(atoms_of(factor)) for factor in factors_of(axis)]


def test_selected_queries_keys_and_values_are_kept_apart() -> None:
    unifier, axis, (queries, keys, values) = packed()
    assert spaces(axis) == [3, 3, 3]
    unifier.unify(queries[0], keys[0])
    unifier.unify(queries[0], values[0])
    unifier.unify(queries[1], keys[1])
    assert resolve(queries[1]) is resolve(keys[1])
    assert resolve(values[1]) is not resolve(keys[1])
    assert spaces(axis) == [3, 1, 2]


def test_selection_in_any_order_gives_the_same_type() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        unifier = Unifier()
        axis = Leaf(60)
        view = unifier.regroup([axis], [3, 4, 5])
        for index in order:
            unifier.narrow(view, 0, index, index + 1)
        assert spaces(axis) == [3, 3, 3]


def test_case_collapses_in_a_tensor_that_lacks_the_summands() -> None:
    unifier, axis, parts = packed()
    three, heads, size = factors_of(axis)
    unifier.seal([three, heads, size])
    assert isinstance(resolve(size), Case)
    unifier.seal([heads, size])
    assert describe(axis) == "(1+1+1)*4*5"
    assert len({resolve(part[1]) for part in parts}) == 1


def test_collapsed_case_is_not_told_apart_again() -> None:
    unifier, axis, _ = packed()
    unifier.seal(factors_of(axis)[1:])
    three, heads, size = factors_of(axis)
    narrowed = unifier.narrow([three, heads, size], 0, 0, 1)
    assert narrowed[2] is size
    assert describe(axis) == "(1+1+1)*4*5"


def test_a_separate_axis_does_not_depend_on_summands() -> None:
    unifier = Unifier()
    rows, columns = Leaf(6), Leaf(5)
    narrowed = unifier.narrow([rows, columns], 0, 0, 2)
    assert narrowed[1] is columns
    assert describe(rows) == "2+4"
    assert describe(columns) == "5"


def test_case_meets_a_leaf_in_one_summand_only() -> None:
    unifier, axis, (queries, keys, _) = packed()
    outside = Leaf(5)
    unifier.unify(queries[1], outside)
    unifier.fix(outside, "order", "rotary")
    assert not is_free(queries[1])
    assert is_free(keys[1])
    assert spaces(axis) == [3, 3, 3]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 2), (2, 5), (1, 4)])
def test_narrow_of_a_leaf(start: int, stop: int) -> None:
    unifier, other = Unifier(), Leaf(3)
    axis = Leaf(5)
    narrowed = unifier.narrow([other, axis], 1, start, stop)
    assert narrowed[1].size == stop - start
    assert narrowed[0] is other
    assert sum(part.size for part in parts_of(axis)) == 5
    assert atoms_of(narrowed[1]) <= atoms_of(axis)


def test_concatenated_halves_are_the_whole_again() -> None:
    unifier, axis = Unifier(), Leaf(6)
    halves = [unifier.narrow([axis], 0, 0, 3)[0], unifier.narrow([axis], 0, 3, 6)[0]]
    joined = unifier.unify(concatenation(halves), axis)
    assert is_free(axis)
    assert describe(joined) == describe(axis) == "3+3"


def test_swapped_halves_unify_with_each_other() -> None:
    unifier, axis = Unifier(), Leaf(6)
    halves = [unifier.narrow([axis], 0, 0, 3)[0], unifier.narrow([axis], 0, 3, 6)[0]]
    unifier.unify(concatenation(halves[::-1]), axis)
    first, second = parts_of(axis)
    assert first is second


def test_a_packed_axis_may_be_cut_first_and_viewed_later() -> None:
    unifier, axis = Unifier(), Leaf(60)
    parts = [unifier.narrow([axis], 0, 20 * index, 20 * index + 20) for index in range(3)]
    for part in parts:
        unifier.regroup(part, [4, 5])
    assert describe(axis) == "4*5+4*5+4*5"
    view = unifier.regroup([axis], [3, 4, 5])
    assert describe(view[2]) == "{5|5|5}"
    assert describe(unifier.narrow(view, 0, 1, 2)[2]) == "5"
    assert resolve(unifier.narrow(view, 0, 1, 2)[2]) is factors_of(parts[1][0])[1]


def test_product_type_is_exported_in_normal_form() -> None:
    unifier, axis = Unifier(), Leaf(24)
    unifier.regroup([axis], [2, 3, 4])
    resolved = resolve(axis)
    assert isinstance(resolved, Product)
    assert [factor.size for factor in factors_of(axis)] == [2, 3, 4]
