"""Element-wise operators: axes align on the right and unify; the result varies where any operand does."""

from __future__ import annotations

from typing import Any

from fxfusion.axes import Axis, Constant
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule

UNARY = (
    "abs acos acosh asin asinh atan atanh bitwise_not ceil celu clone contiguous "
    "cos cosh deg2rad detach digamma dropout elu erf erfc erfinv exp exp2 expm1 feature_dropout floor frac "
    "gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma lift_fresh_copy "
    "log log10 log1p log2 log_sigmoid logical_not mish nan_to_num neg positive reciprocal "
    "relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt "
    "square tan tanh threshold trunc alias to _to_copy type_as "
    "angle conj_physical _conj _conj_physical resolve_conj resolve_neg _neg_view i0 logit mvlgamma "
    "special_erfcx special_i0e special_i1 special_i1e special_ndtri special_log_ndtr special_entr "
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_airy_ai "
    "special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 "
    "special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
    "special_spherical_bessel_j0"
)
BINARY = (
    "__and__ __or__ __xor__ __lshift__ __rshift__ add addcdiv addcmul atan2 bitwise_and bitwise_or "
    "bitwise_xor bitwise_left_shift bitwise_right_shift clamp clamp_max clamp_min copysign "
    "eq fmax "
    "fmin ge gt hypot ldexp le lerp logaddexp logaddexp2 logical_and logical_or logical_xor lt "
    "masked_fill maximum minimum mul ne pow rsub sub true_divide where xlogy "
    "complex polar heaviside igamma igammac polygamma special_xlog1py special_zeta gcd lcm"
)


@rule(*UNARY.split())
def unary(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    """Keep every axis. What else is given (``type_as``'s second operand) is read for metadata only."""
    return Typed(x.axes)


@rule(*BINARY.split())
def binary(context: Context, *operands: Any, **named: Any) -> Typed:
    """Unify aligned axes."""
    given = [*operands, *named.values()]
    return context.broadcast(*(operand for operand in given if isinstance(operand, Typed)))


@rule("copy")
def copy(context: Context, x: Typed, source: Typed, *_: Any, **__: Any) -> Typed:
    """``x.copy_(source)``: the old values are not read, the new ones repeat where the source broadcasts."""
    missing = x.rank - source.rank
    axes: list[Axis] = [Constant(size) for size in x.shape[:missing]]
    for size, axis in zip(x.shape[missing:], source.axes, strict=True):
        axes.append(axis if axis.size == size else Constant(size))
    return Typed(tuple(axes))


@rule("native_dropout", "frexp")
def native_dropout(context: Context, x: Typed, *_: Any, **__: Any) -> list[Typed]:
    """Dropout that also returns its mask; mantissa and exponent."""
    return [Typed(x.axes), Typed(x.axes)]


@rule("prelu", "rrelu_with_noise", "rrelu")
def prelu(context: Context, x: Typed, weight: Any = None, *_: Any, **__: Any) -> Typed:
    """``prelu(x, weight)``: one slope per channel (axis 1), or one for all."""
    if isinstance(weight, Typed) and weight.rank == 1 and weight.shape[0] > 1:
        context.kept(weight)
        return Typed((x.axes[0], context.unify(x.axes[1], weight.axes[0]), *x.axes[2:]))
    return Typed(x.axes)


@rule("glu")
def glu(context: Context, x: Typed, dim: int = -1) -> Typed:
    """``a * sigmoid(b)`` of the two halves of an axis."""
    half = x.shape[dim] // 2
    axis = dim % x.rank
    first = context.narrow(x, axis, 0, half)
    second = context.narrow(x, axis, half, 2 * half)
    return context.broadcast(Typed(tuple(first)), Typed(tuple(second)))
