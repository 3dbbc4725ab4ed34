"""Fourier transforms mix the positions along some axes, and complex numbers add an axis of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import rule


def _transform(context: Context, x: Typed, dims: Sequence[int]) -> Typed:
    """Replace axes by new fixed ones; the others are transformed alike."""
    transformed = [dim % x.rank for dim in dims]
    context.fix(*(x.axes[dim] for dim in transformed), message="frequencies along it have an order")
    return Typed(
        tuple(
            context.fixed(size) if dim in transformed else axis
            for dim, (axis, size) in enumerate(zip(x.axes, context.shapes[0], strict=True))
        )
    )


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def transform(context: Context, x: Typed, n: Any = None, dim: int = -1, norm: Any = None) -> Typed:
    """Transform one axis, cut or padded to ``n``."""
    return _transform(context, x, [dim])


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2")
def transform2(
    context: Context, x: Typed, s: Any = None, dim: Sequence[int] = (-2, -1), norm: Any = None
) -> Typed:
    """Transform two axes."""
    return _transform(context, x, dim)


@rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn")
def transform_many(context: Context, x: Typed, s: Any = None, dim: Any = None, norm: Any = None) -> Typed:
    """Transform several axes: all, or as many last ones as there are sizes in ``s``."""
    if dim is None:
        dim = range(x.rank if s is None else len(s))
        dim = [axis - len(dim) for axis in dim]
    return _transform(context, x, dim)


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def transform_core(context: Context, x: Typed, dim: Sequence[int], *_: Any) -> Typed:
    """What all transforms are made of."""
    return _transform(context, x, dim)


@rule("view_as_real", "view_as_real_copy")
def view_as_real(context: Context, x: Typed) -> Typed:
    """Real and imaginary parts along a new last axis."""
    return Typed((*x.axes, context.fixed(2)))


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(context: Context, x: Typed) -> Typed:
    """Complex numbers from the two places of the last axis."""
    context.fix(x.axes[-1], message="its places are real and imaginary parts")
    return Typed(x.axes[:-1])
