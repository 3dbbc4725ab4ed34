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


def reduce_axes(context: Context, x: Typed, dim: Any, keepdim: bool) -> Typed:
    dims = reduced_axes(x, dim)
    kept = [axis for index, axis in enumerate(x.axes) if index not in dims]
    context.mix(kept, [x.axes[index] for index in dims])
    if not keepdim:
        return Typed(tuple(kept))
    return Typed(tuple(Constant(1) if index in dims else axis for index, axis in enumerate(x.axes)))


@rule("mean", "sum", "amax", "amin", "prod", "logsumexp", "all", "any", "nansum", "count_nonzero")
def reduction(context: Context, x: Typed, dim: Any = None, keepdim: bool = False, **_: Any) -> Typed:
    """Reduce axes by a function that does not see their order."""
    return reduce_axes(context, x, dim, keepdim)


@rule("var", "std")
def variance(context: Context, x: Typed, dim: Any = None, *args: Any, **kwargs: Any) -> Typed:
    """Variance over axes; the output's rank says whether they are kept."""
    dims = None if isinstance(dim, bool) else dim
    return reduce_axes(context, x, dims, len(context.shapes[0]) == x.rank)


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
    return reduce_axes(context, x, dim, keepdim)


@rule("kthvalue", "median", "nanmedian", "mode")
def order_statistic(context: Context, x: Typed, *args: Any, **named: Any) -> Typed | Sequence[Typed]:
    """The value of a rank along an axis, and where it is; or, of one argument, of all elements."""
    if len(context.shapes) == 1:
        return reduce_axes(context, x, None, False)
    place = 1 if ".kthvalue" in context.operator else 0
    dim = named.get("dim", args[place] if len(args) > place else -1)
    values = reduce_axes(context, x, dim, len(context.shapes[0]) == x.rank)
    context.fix(*x.axes[dim:][:1], message="a position along it is an output")
    return [values, values]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(context: Context, x: Typed, dim: int, *_: Any, **__: Any) -> Typed:
    """Normalise along an axis; units keep their places."""
    mixed = dim % x.rank
    context.mix([axis for index, axis in enumerate(x.axes) if index != mixed], [x.axes[mixed]])
    return Typed(x.axes)


@rule("cumprod", "logcumsumexp", "cummax", "cummin")
def scan(context: Context, x: Typed, dim: int, *_: Any, **__: Any) -> Typed | Sequence[Typed]:
    """Scan along an axis: its order matters."""
    axis = dim % x.rank if x.rank else 0
    context.fix(x.axes[axis], message="the order along it matters")
    outputs = [
        Typed((*x.axes[:axis], context.fixed(shape[axis]), *x.axes[axis + 1 :])) for shape in context.shapes
    ]
    return outputs[0] if len(outputs) == 1 else outputs
