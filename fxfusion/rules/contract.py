"""Contractions, each in its notation."""

from __future__ import annotations

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


@rule("dot", "vdot", "inner")
def dot(context: Context, left: Typed, right: Typed) -> Typed:
    """Inner product of vectors."""
    return context.einsum("k, k ->", left, right)


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
