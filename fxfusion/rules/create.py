"""Operators that make a tensor and read at most another one's metadata: nothing unifies."""

from __future__ import annotations

from typing import Any

from fxfusion.axes import Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.meaning import reads_values
from fxfusion.rules.registry import rule


@reads_values
@rule(
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "zeros", "ones", "full", "empty", "scalar_tensor", "fill", "empty_strided",
    "new_empty_strided", "empty_permuted",
)  # fmt: skip
def constant(context: Context, *_: Any, **__: Any) -> Typed:
    """A tensor of one value varies along no axis."""
    return Typed(tuple(Constant(size) for size in context.shapes[0]))
