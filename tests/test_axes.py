"""The algebra of axis types: normal forms, resolution, reading."""

from __future__ import annotations

import pytest

from fxfusion.axes import (
    Axis,
    Case,
    Constant,
    Leaf,
    Product,
    Reason,
    Sum,
    atoms_of,
    case,
    children_of,
    concatenation,
    describe,
    factors_of,
    is_free,
    leaves_of,
    merge_fixed,
    parts_of,
    product,
    resolve,
)

WHY = Reason("input", "x", "placeholder", "model.py:1", "it is an axis of an input")


def fixed(size: int) -> Leaf:
    return Leaf(size, fixed=WHY)


def test_sizes_follow_from_the_structure() -> None:
    inner = Product((Leaf(2), Leaf(3)))
    assert inner.size == 6
    assert Sum((inner, Leaf(4))).size == 10
    assert Case((Leaf(1), Leaf(1)), (inner, Leaf(6))).size == 6


def test_product_is_flat_and_has_no_factors_of_one() -> None:
    a, b, c = Leaf(2), Leaf(3), Leaf(4)
    assert factors_of(product([a, Constant(1), product([b, Leaf(1)]), c])) == [a, b, c]
    assert product([Constant(1), a]) is a
    assert isinstance(product([]), Constant)
    assert isinstance(product([Leaf(1)]), Constant)


def test_adjacent_constants_merge_and_spaces_keep_their_identity() -> None:
    assert describe(product([Constant(2), Constant(3), Leaf(4)])) == "=6*4"
    assert describe(product([Leaf(4), fixed(2), fixed(3)])) == "4*2!*3!"
    assert describe(product([fixed(2), Leaf(4), fixed(3)])) == "2!*4*3!"


def test_two_fixed_spaces_merge_where_a_view_needs_it() -> None:
    merged = merge_fixed(fixed(2), fixed(3))
    assert isinstance(merged, Leaf)
    assert (merged.size, merged.fixed) == (6, WHY)
    assert merge_fixed(fixed(2), Leaf(3)) is None
    assert merge_fixed(Leaf(2), fixed(3)) is None


def test_concatenation_is_flat_and_has_no_empty_parts() -> None:
    a, b, c = Leaf(2), Leaf(3), Leaf(4)
    assert parts_of(concatenation([a, concatenation([b, Constant(0)]), c])) == [a, b, c]
    assert concatenation([Constant(0), a]) is a


def test_case_of_one_alternative_is_that_alternative() -> None:
    keys, same = (Leaf(1), Leaf(1)), Leaf(5)
    assert case(keys, [same, same]) is same
    assert isinstance(case(keys, [Constant(5), Constant(5)]), Constant)
    assert isinstance(case(keys, [Leaf(5), same]), Case)


def test_resolve_follows_chains_and_shortens_them() -> None:
    a, b, c = Leaf(3), Leaf(3), Leaf(3)
    a.bound, b.bound = b, c
    assert resolve(a) is c
    assert a.bound is c


def test_resolved_case_of_equal_alternatives_remembers_its_keys() -> None:
    keys = (Leaf(1), Leaf(1))
    left, right = Leaf(4), Leaf(4)
    found = Case(keys, (left, right))
    assert resolve(found) is found
    right.bound = left
    assert resolve(found) is left
    assert left.independent == keys


def test_leaves_are_yielded_with_repetition_and_below_alternatives() -> None:
    a, b, key = Leaf(2), Leaf(2), Leaf(1)
    axis = Product((Sum((key, key)), Case((key, key), (a, b)), a))
    assert list(leaves_of(axis)) == [key, key, a, b, a]
    assert atoms_of(axis) == {key, a, b}


@pytest.mark.parametrize(
    ("axis", "free"),
    [
        (Leaf(3), True),
        (Leaf(1), False),
        (fixed(3), False),
        (Constant(3), False),
        (Product((fixed(3), Leaf(2))), True),
        (Sum((fixed(3), Leaf(1))), False),
    ],
)
def test_is_free(axis: Axis, free: bool) -> None:
    assert is_free(axis) is free


def test_children() -> None:
    a, b = Leaf(2), Leaf(2)
    for kind in (Product((a, b)), Sum((a, b)), Case((Leaf(1), Leaf(1)), (a, b))):
        assert children_of(kind) == (a, b)
    assert children_of(a) == children_of(Constant(2)) == ()


def test_describe() -> None:
    heads = Product((Leaf(12), Leaf(64)))
    assert describe(heads) == "12*64"
    assert describe(Sum((heads, Leaf(5), Constant(2)))) == "12*64+5+=2"
    assert describe(Product((Sum((Leaf(1), Leaf(2))), fixed(7)))) == "(1+2)*7!"
    assert describe(Case((Leaf(1), Leaf(1)), (Leaf(4), Leaf(4)))) == "{4|4}"


def test_reason_chain_ends_at_the_first_cause() -> None:
    second = Reason("input", "add", "aten.add", "model.py:2", "it meets an axis that is fixed", WHY)
    third = Reason("input", "mul", "aten.mul", "model.py:3", "it meets an axis that is fixed", second)
    assert list(third.chain()) == [third, second, WHY]
