"""Contractions, each in its notation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """``torch.einsum``; a diagonal (a label twice in one operand) is not supported."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # implicit: labels that occur once, in alphabetical order
        letters = inputs.replace(",", "").replace(".", "")
        result = "..." * ("..." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = [*inputs.split(","), result]
    spaced = [" ".join(term.replace("...", "*")).replace("*", "...") for term in terms]
    return context.einsum(f"{', '.join(spaced[:-1])} -> {spaced[-1]}", *operands)


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


@rule("bilinear")
def bilinear(context: Context, left: Typed, right: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    """``left @ weight @ right + bias``."""
    return context.broadcast(context.einsum("... i, ... j, o i j -> ... o", left, right, weight), bias)
