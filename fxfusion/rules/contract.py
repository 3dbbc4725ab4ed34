"""Contractions, each in its notation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Axis
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule


@rule("linear")
def linear(context: Context, x: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    """``x @ weight.T + bias``."""
    if weight.rank == 1:
        return context.einsum("... i, i -> ...", x, weight)
    return context.broadcast(context.einsum("... i, o i -> ... o", x, weight), bias)


@rule("matmul")
def matmul(context: Context, left: Typed, right: Typed) -> Typed:
    """``left @ right``; leading axes broadcast, a vector takes part as row or column."""
    text = {
        (True, True): "k, k ->",
        (True, False): "k, ... k j -> ... j",
        (False, True): "... i k, k -> ... i",
        (False, False): "... i k, ... k j -> ... i j",
    }[left.rank == 1, right.rank == 1]
    return context.einsum(text, left, right)


@rule("mm")
def mm(context: Context, left: Typed, right: Typed) -> Typed:
    """``left @ right`` of matrices."""
    return context.einsum("i k, k j -> i j", left, right)


@rule("bmm")
def bmm(context: Context, left: Typed, right: Typed) -> Typed:
    """``left @ right`` of batches of matrices."""
    return context.einsum("b i k, b k j -> b i j", left, right)


@rule("mv")
def mv(context: Context, matrix: Typed, vector: Typed) -> Typed:
    """``matrix @ vector``."""
    return context.einsum("i k, k -> i", matrix, vector)


@rule("dot", "vdot")
def dot(context: Context, left: Typed, right: Typed) -> Typed:
    """Inner product of vectors."""
    return context.einsum("k, k ->", left, right)


@rule("inner")
def inner(context: Context, left: Typed, right: Typed) -> Typed:
    """Contract the last axes; a scalar scales."""
    if not left.rank or not right.rank:
        return context.broadcast(left, right)
    rows = " ".join(f"i{axis}" for axis in range(left.rank - 1))
    columns = " ".join(f"j{axis}" for axis in range(right.rank - 1))
    return context.einsum(f"{rows} k, {columns} k -> {rows} {columns}", left, right)


@rule("einsum")
def einsum(context: Context, equation: str, operands: Sequence[Typed], **_: Any) -> Typed:
    """``torch.einsum``; a label twice in one operand is a diagonal, an ellipsis may stand anywhere."""
    inputs, arrow, result = equation.replace(" ", "").replace("...", "*").partition("->")
    if not arrow:  # implicit: labels that occur once, in alphabetical order
        letters = inputs.replace(",", "").replace("*", "")
        result = "*" * ("*" in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms, tensors = [], []
    for term, operand in zip(inputs.split(","), operands, strict=True):
        tensors.append(_einsum_operand(context, term, operand))
        terms.append("*" * ("*" in term) + "".join(dict.fromkeys(term.replace("*", ""))))
    terms.append("*" * ("*" in result) + result.replace("*", ""))
    spaced = [" ".join(term).replace("*", "...") for term in terms]
    typed = context.einsum(f"{', '.join(spaced[:-1])} -> {spaced[-1]}", *tensors)
    before, extra = max(result.find("*"), 0), typed.rank - len(result.replace("*", ""))
    return Typed((*typed.axes[extra : extra + before], *typed.axes[:extra], *typed.axes[extra + before :]))


def _einsum_operand(context: Context, term: str, operand: Typed) -> Typed:
    """Return an operand with the axes of its ellipsis first, and one axis per label."""
    before, _, after = term.partition("*")
    extra = operand.rank - len(before) - len(after)
    ellipsis = operand.axes[len(before) : len(before) + extra]
    named: dict[str, Axis] = {}
    for label, axis in zip(
        before + after, (*operand.axes[: len(before)], *operand.axes[len(before) + extra :]), strict=True
    ):
        named[label] = context.unify(named[label], axis) if label in named else axis
    if not before * bool(extra) and len(named) == len(before + after):
        return operand
    return Typed((*ellipsis, *named.values()), origins=operand.origins, value=operand.value)


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(context: Context, left: Typed, right: Typed, *_: Any, **__: Any) -> Typed:
    """Distances between the rows of two matrices: any norm is blind to the order of coordinates."""
    return context.einsum("... i k, ... j k -> ... i j", left, right)


@rule("outer")
def outer(context: Context, left: Typed, right: Typed) -> Typed:
    """Outer product of vectors."""
    return context.einsum("i, j -> i j", left, right)


@rule("addmm")
def addmm(context: Context, bias: Typed, left: Typed, right: Typed, **_: Any) -> Typed:
    """``bias + left @ right``: GPT-2's Conv1D."""
    return context.broadcast(context.einsum("i k, k j -> i j", left, right), bias)


@rule("baddbmm")
def baddbmm(context: Context, bias: Typed, left: Typed, right: Typed, **_: Any) -> Typed:
    """``bias + left @ right`` of batches."""
    return context.broadcast(context.einsum("b i k, b k j -> b i j", left, right), bias)


@rule("addbmm")
def addbmm(context: Context, bias: Typed, left: Typed, right: Typed, **_: Any) -> Typed:
    """``bias + left @ right`` summed over the batch."""
    return context.broadcast(context.einsum("b i k, b k j -> i j", left, right), bias)


@rule("bilinear")
def bilinear(context: Context, left: Typed, right: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    """``left @ weight @ right + bias``."""
    return context.broadcast(context.einsum("... i, ... j, o i j -> ... o", left, right, weight), bias)
