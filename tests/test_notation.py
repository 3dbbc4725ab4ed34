"""The notation of contractions: parsing, expansion, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.errors import NotationError
from fxfusion.notation import Contraction, expand, parse


def test_parse() -> None:
    assert parse("... i, o i -> ... o") == Contraction((("...", "i"), ("o", "i")), ("...", "o"))
    assert parse("k, k ->") == Contraction((("k",), ("k",)), ())
    assert parse("->") == Contraction(((),), ())


def test_parsing_is_cached() -> None:
    assert parse("i k, k j -> i j") is parse("i k, k j -> i j")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("i, i", "no arrow"),
        ("i i -> i", "repeats a label"),
        ("i j -> i i", "repeats a label"),
        ("i ... -> i", "ellipsis that does not stand first"),
        ("i -> i ...", "ellipsis that does not stand first"),
        ("i -> j", r"\['j'\]"),
        ("i -> ...", r"\['\.\.\.'\]"),
    ],
)
def test_parse_refuses(text: str, complaint: str) -> None:
    with pytest.raises(NotationError, match=complaint):
        parse(text)


def test_ellipses_align_on_the_right() -> None:
    found = expand(parse("... i k, ... k j -> ... i j"), (2, 4))
    assert found.operands == (("i", "k"), ("...1", "...0", "k", "j"))
    assert found.result == ("...1", "...0", "i", "j")


def test_expand_without_ellipsis_changes_nothing() -> None:
    contraction = parse("b i k, b k j -> b i j")
    assert expand(contraction, (3, 3)) == contraction


@pytest.mark.parametrize(
    ("ranks", "complaint"), [((1,), "2 operands"), ((0, 2), "rank 0"), ((3, 3), "rank 3"), ((3, 1), "rank 1")]
)
def test_expand_refuses(ranks: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(NotationError, match=complaint):
        expand(parse("... i, o i -> ... o"), ranks)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_expanded_operands_have_their_ranks(ranks: list[int]) -> None:
    text = ", ".join(["... i"] * len(ranks)) + " -> ..."
    found = expand(parse(text), tuple(ranks))
    assert [len(labels) for labels in found.operands] == ranks
    assert len(found.result) == max(ranks) - 1
    for labels in found.operands:
        assert len(set(labels)) == len(labels)
        assert found.result[len(found.result) - len(labels) + 1 :] == labels[:-1]
