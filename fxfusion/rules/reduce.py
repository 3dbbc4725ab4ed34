"""Symmetric reductions and softmax: blind to the order along an axis, so a permutation passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule


def reduced_axes(x: Typed, dim: Any) -> list[int]:
    """Return the axes that ``dim`` names: one, several, or all for None and for the empty list."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(x.rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [axis % x.rank for axis in dims] if x.rank else []


def _reduce(context: Context, x: Typed, dim: Any, keepdim: bool) -> Typed:
    dims = reduced_axes(x, dim)
    kept = [axis for index, axis in enumerate(x.axes) if index not in dims]
    context.mix(kept, [x.axes[index] for index in dims])
    if not keepdim:
        return Typed(tuple(kept))
    return Typed(tuple(Constant(1) if index in dims else axis for index, axis in enumerate(x.axes)))


@rule("mean", "sum", "amax", "amin", "prod", "logsumexp", "all", "any", "nansum")
def reduction(context: Context, x: Typed, dim: Any = None, keepdim: bool = False, **_: Any) -> Typed:
    """Reduce axes by a function that does not see their order."""
    return _reduce(context, x, dim, keepdim)


@rule("var", "std")
def variance(context: Context, x: Typed, dim: Any = None, *args: Any, **kwargs: Any) -> Typed:
    """Variance over axes; the output's rank says whether they are kept."""
    dims = None if isinstance(dim, bool) else dim
    return _reduce(context, x, dims, len(context.shapes[0]) == x.rank)


@rule("var_mean", "std_mean")
def variance_and_mean(
    context: Context, x: Typed, dim: Any = None, *args: Any, **kwargs: Any
) -> Sequence[Typed]:
    """Variance and mean over axes."""
    both = variance(context, x, dim)
    return [both, both]


@rule("linalg_vector_norm", "norm")
def vector_norm(
    context: Context, x: Typed, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Typed:
    """Vector norm over axes."""
    return _reduce(context, x, dim, keepdim)


@rule("max", "min")
def extremum(context: Context, x: Typed, dim: Any = None, keepdim: bool = False) -> Typed | Sequence[Typed]:
    """The largest value: of two tensors element by element, of all, or along an axis with its position."""
    if isinstance(dim, Typed):
        return context.broadcast(x, dim)
    if dim is None:
        return _reduce(context, x, None, False)
    values = _reduce(context, x, dim, keepdim)
    context.fix(x.axes[dim], message="the position of an extremum along it is an output")
    return [values, values]


@rule("argmax", "argmin")
def position(context: Context, x: Typed, dim: Any = None, keepdim: bool = False) -> Typed:
    """The position of an extremum: positions along the axis have a meaning."""
    context.fix(*(x.axes[axis] for axis in reduced_axes(x, dim)), message="a position along it is an output")
    return _reduce(context, x, dim, keepdim)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(context: Context, x: Typed, dim: int, *_: Any, **__: Any) -> Typed:
    """Normalise along an axis; units keep their places."""
    mixed = dim % x.rank
    context.mix([axis for index, axis in enumerate(x.axes) if index != mixed], [x.axes[mixed]])
    return Typed(x.axes)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk")
def ordered(context: Context, x: Typed, *args: Any, **kwargs: Any) -> Typed | Sequence[Typed]:
    """Scan, sort or select along an axis: its order matters or is made visible."""
    operator = context.operator
    place = 1 if ".topk" in operator else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else (0 if "cum" in operator else -1))
    axis = dim % x.rank if isinstance(dim, int) else x.rank - 1
    context.fix(x.axes[axis], message="the order along it matters")
    outputs = [
        Typed((*x.axes[:axis], context.fixed(shape[axis]), *x.axes[axis + 1 :])) for shape in context.shapes
    ]
    return outputs[0] if len(outputs) == 1 else outputs
