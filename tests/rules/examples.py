"""Example arguments for every operator rule: at least one per name, several where a rule has branches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxfusion.testing import Free

aten = torch.ops.aten
_seeds = itertools.count()


@dataclasses.dataclass(frozen=True)
class Example:
    """One call of an operator."""

    operator: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def call(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Example:
    """Return an example of one call."""
    return Example(operator, args, kwargs)


def real(*shape: int) -> torch.Tensor:
    """Return random numbers, others at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(_seeds)), dtype=torch.float64)


def positive(*shape: int, low: float = 0.1, high: float = 0.9) -> torch.Tensor:
    """Return random numbers in an interval."""
    generator = torch.Generator().manual_seed(next(_seeds))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def whole(*shape: int, high: int = 64) -> Free:
    """Return random integers that stand for data."""
    return Free(torch.randint(1, high, shape, generator=torch.Generator().manual_seed(next(_seeds))))


def truth(*shape: int) -> torch.Tensor:
    """Return random booleans: both values occur along every axis."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(next(_seeds))) < 0.5


INDICES = torch.tensor([[0, 1, 1], [2, 0, 3]])
PICKED = torch.tensor([0, 1, 1, 3, 2])
UNEVEN = torch.tensor([1, 3, 2])


def _unary() -> dict[str, list[Example]]:
    domains: dict[str, torch.Tensor] = {
        "acosh": positive(2, 5, low=1.1, high=3.0),
        "isnan": real(3, 5).where(truth(3, 5), torch.nan),
        "isinf": real(3, 5).where(truth(3, 5), torch.inf),
        "isfinite": real(3, 5).where(truth(3, 5), torch.inf),
        "nan_to_num": real(3, 5).where(truth(3, 5), torch.nan),
    }
    inside = [
        "acos",
        "asin",
        "atanh",
        "digamma",
        "erfinv",
        "lgamma",
        "log",
        "log10",
        "log1p",
        "log2",
        "rsqrt",
        "sqrt",
    ]
    plain = (
        "abs acos acosh asin asinh atan atanh ceil celu clone contiguous cos cosh deg2rad detach digamma elu "
        "erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite "
        "isinf isnan leaky_relu lgamma lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not mish "
        "nan_to_num neg positive reciprocal relu relu6 round rsqrt selu sgn sigmoid sign signbit silu sin "
        "sinc sinh softplus softshrink sqrt square tan tanh trunc alias"
    )
    found = {}
    for name in plain.split():
        x = domains.get(name, positive(2, 5) if name in inside else real(2, 5) * 3)
        found[name] = [call(getattr(aten, name).default, x)]
    found["bitwise_not"] = [call(aten.bitwise_not.default, whole(2, 5))]
    found["clamp"] = [
        call(aten.clamp.default, real(2, 5), -0.5, 0.5),
        call(aten.clamp.Tensor, real(3, 5), real(5) - 1, real(3, 1) + 0.5),
    ]
    found["clamp_max"] = [
        call(aten.clamp_max.default, real(2, 5), 0.5),
        call(aten.clamp_max.Tensor, real(3, 5), real(5)),
    ]
    found["clamp_min"] = [
        call(aten.clamp_min.default, real(2, 5), 0.5),
        call(aten.clamp_min.Tensor, real(3, 5), real(5)),
    ]
    found["dropout"] = [call(aten.dropout.default, real(2, 5), 0.5, False)]
    found["feature_dropout"] = [call(aten.feature_dropout.default, real(2, 5), 0.5, False)]
    found["native_dropout"] = [call(aten.native_dropout.default, real(2, 5), 0.5, False)]
    found["threshold"] = [call(aten.threshold.default, real(2, 5), 0.1, 0.2)]
    found["to"] = [
        call(aten.to.dtype, real(2, 5), torch.float64),
        call(aten.to.other, real(2, 5), real(5)),
    ]
    found["_to_copy"] = [call(aten._to_copy.default, real(2, 5), dtype=torch.float64)]
    found["type_as"] = [call(aten.type_as.default, real(2, 5), real(2, 5))]
    return found


def _binary() -> dict[str, list[Example]]:
    found = {}
    bits = ["__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"]
    for name in bits:
        found[name] = [call(getattr(aten, name).Tensor, whole(3, 5), whole(5))]
    for name in ["__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift"]:
        found[name] = [call(getattr(aten, name).Tensor, whole(3, 5), whole(5, high=4))]
    for name in ["add", "div", "fmod", "ldexp", "mul", "remainder", "rsub", "sub", "true_divide"]:
        x, y = (positive(3, 5) * 9).round(), (positive(5) * 5).round()
        found[name] = [call(getattr(aten, name).Tensor, x, y)]
    for name in ["eq", "ge", "gt", "le", "lt", "ne"]:
        x, y = (positive(3, 5) * 4).round(), (positive(5) * 4).round()
        found[name] = [call(getattr(aten, name).Tensor, x, y)]
    for name in [
        "atan2",
        "floor_divide",
        "fmax",
        "fmin",
        "hypot",
        "logaddexp",
        "logaddexp2",
        "maximum",
        "minimum",
    ]:
        found[name] = [call(getattr(aten, name).default, real(3, 5), real(5))]
    for name in ["logical_and", "logical_or", "logical_xor"]:
        found[name] = [call(getattr(aten, name).default, Free(truth(3, 5)), Free(truth(5)))]
    found["add"] += [
        call(aten.add.Tensor, real(4, 1, 3), real(5, 1)),
        call(aten.add.Scalar, real(2, 3), 2.0),
    ]
    found["addcdiv"] = [call(aten.addcdiv.default, real(3, 5), real(5), positive(3, 1))]
    found["addcmul"] = [call(aten.addcmul.default, real(3, 5), real(5), real(3, 1))]
    found["copysign"] = [call(aten.copysign.Tensor, real(3, 5), real(5))]
    found["copy"] = [call(aten.copy.default, real(3, 5), real(5))]
    found["lerp"] = [
        call(aten.lerp.Tensor, real(3, 5), real(5), real(3, 1)),
        call(aten.lerp.Scalar, real(3, 5), real(5), 0.3),
    ]
    found["masked_fill"] = [
        call(aten.masked_fill.Scalar, real(3, 5), Free(truth(5)), 0.0),
        call(aten.masked_fill.Tensor, real(3, 5), truth(3, 1), torch.tensor(2.0)),
    ]
    found["pow"] = [
        call(aten.pow.Tensor_Tensor, positive(3, 5), real(5)),
        call(aten.pow.Tensor_Scalar, real(3, 5), 2),
        call(aten.pow.Scalar, 2, real(3, 5)),
    ]
    found["where"] = [
        call(aten.where.self, Free(truth(4, 5)), real(5), real(4, 1)),
        call(aten.where.ScalarOther, truth(4, 5), real(5), 0.0),
    ]
    found["xlogy"] = [call(aten.xlogy.Tensor, real(3, 5), positive(5))]
    found["prelu"] = [
        call(aten.prelu.default, real(2, 5, 3), positive(5)),
        call(aten.prelu.default, real(2, 5, 3), positive(1)),
    ]
    found["rrelu"] = [call(aten.rrelu.default, real(2, 5))]
    found["rrelu_with_noise"] = [call(aten.rrelu_with_noise.default, real(2, 5), real(2, 5))]
    found["glu"] = [call(aten.glu.default, real(3, 10)), call(aten.glu.default, real(2, 6, 3), 1)]
    return found


def _view() -> dict[str, list[Example]]:
    matrices = [real(3, 5), real(2, 5)]
    return {
        "view": [
            call(aten.view.default, real(2, 6, 4), [2, 2, 3, 4]),
            call(aten.view.default, real(2, 6, 5), [12, 5]),
            call(aten.view.default, real(6, 4), [4, 6]),
            call(aten.view.dtype, real(2, 5), torch.int64),
            call(aten.view.dtype, Free(whole(2, 6).tensor.int()), torch.int64),
        ],
        "reshape": [call(aten.reshape.default, real(2, 3, 4), [6, 4])],
        "_unsafe_view": [call(aten._unsafe_view.default, real(2, 3, 4), [2, 12])],
        "view_copy": [call(aten.view_copy.default, real(2, 3, 4), [24])],
        "flatten": [call(aten.flatten.using_ints, real(2, 3, 4), 1, 2)],
        "unflatten": [call(aten.unflatten.int, real(5, 6), 1, [2, 3])],
        "squeeze": [
            call(aten.squeeze.dim, real(3, 1, 5), 1),
            call(aten.squeeze.dims, real(3, 1, 5, 1), [1, 3]),
        ],
        "unsqueeze": [call(aten.unsqueeze.default, real(3, 5), 1)],
        "permute": [call(aten.permute.default, real(2, 3, 5), [2, 0, -2])],
        "permute_copy": [call(aten.permute_copy.default, real(2, 3, 5), [2, 0, 1])],
        "transpose": [call(aten.transpose.int, real(2, 3, 5), 0, -1)],
        "transpose_copy": [call(aten.transpose_copy.int, real(2, 3, 5), 1, 2)],
        "swapaxes": [call(aten.swapaxes.default, real(2, 3, 5), 0, 2)],
        "t": [call(aten.t.default, real(3, 5)), call(aten.t.default, real(5))],
        "numpy_T": [call(aten.numpy_T.default, real(3, 5)), call(aten.numpy_T.default, real(3, 5, 2))],
        "mT": [call(aten.mT.default, real(2, 3, 5))],
        "adjoint": [call(aten.adjoint.default, real(2, 3, 5))],
        "movedim": [
            call(aten.movedim.int, real(2, 3, 5), 0, 2),
            call(aten.movedim.intlist, real(2, 3, 5, 4), [0, -1], [1, 0]),
        ],
        "moveaxis": [call(aten.moveaxis.int, real(2, 3, 5), -1, 0)],
        "expand": [call(aten.expand.default, real(3, 1, 5), [2, -1, 4, 5])],
        "expand_copy": [call(aten.expand_copy.default, real(3, 1), [3, 4])],
        "broadcast_to": [call(aten.broadcast_to.default, real(3, 1), [2, 3, 4])],
        "expand_as": [call(aten.expand_as.default, real(3, 1), real(3, 4))],
        "repeat": [call(aten.repeat.default, real(3, 5), [2, 1, 3])],
        "tile": [call(aten.tile.default, real(3, 5), [3])],
        "repeat_interleave": [
            call(aten.repeat_interleave.self_int, real(3, 5), 2, 1),
            call(aten.repeat_interleave.self_int, real(3, 2), 2),
            call(aten.repeat_interleave.self_Tensor, real(3, 5), UNEVEN, 0),
        ],
        "slice": [
            call(aten.slice.Tensor, real(3, 5), 1, 1, 4),
            call(aten.slice.Tensor, real(5, 3), 0, -2),
            call(aten.slice.Tensor, real(3, 6), 1, 1, 9223372036854775807, 2),
            call(aten.slice.Tensor, real(3, 7), 1, 0, 7, 2),
        ],
        "select": [call(aten.select.int, real(3, 5), 1, -2), call(aten.select.int, real(3, 4, 5), 0, 0)],
        "narrow": [call(aten.narrow.default, real(3, 5), 1, 2, 3)],
        "split": [call(aten.split.Tensor, real(3, 7), 3, 1)],
        "split_with_sizes": [call(aten.split_with_sizes.default, real(7, 2), [2, 4, 1])],
        "chunk": [call(aten.chunk.default, real(3, 6), 2, -1)],
        "tensor_split": [
            call(aten.tensor_split.sections, real(3, 7), 3, 1),
            call(aten.tensor_split.indices, real(3, 7), [2, 5], 1),
        ],
        "unsafe_split": [call(aten.unsafe_split.Tensor, real(3, 7), 3, 1)],
        "unsafe_chunk": [call(aten.unsafe_chunk.default, real(3, 6), 3, 1)],
        "unbind": [call(aten.unbind.int, real(3, 5), 1)],
        "cat": [
            call(aten.cat.default, matrices, 0),
            call(aten.cat.default, [real(3, 1), real(3, 5), real(3, 2)], -1),
            call(aten.cat.default, [real(0), real(3, 5)], 1),
        ],
        "concat": [call(aten.concat.default, matrices, 0)],
        "concatenate": [call(aten.concatenate.default, matrices, 0)],
        "stack": [call(aten.stack.default, [real(3, 5), real(3, 5)], -1)],
        "pad": [
            call(aten.pad.default, real(3, 5), [1, 2]),
            call(aten.pad.default, real(2, 3, 5), [1, 2], "reflect"),
        ],
        "constant_pad_nd": [
            call(aten.constant_pad_nd.default, real(3, 5), [1, 2, 0, 4], 0.5),
            call(aten.constant_pad_nd.default, real(3, 5), [-1, 2]),
        ],
        "roll": [call(aten.roll.default, real(3, 5), [2], [1]), call(aten.roll.default, real(3, 5), [2])],
        "flip": [call(aten.flip.default, real(3, 5), [1])],
    }


def _contract() -> dict[str, list[Example]]:
    return {
        "linear": [
            call(aten.linear.default, real(2, 4, 3), real(5, 3), real(5)),
            call(aten.linear.default, real(2, 3), real(5, 3)),
        ],
        "matmul": [
            call(aten.matmul.default, real(3), real(3)),
            call(aten.matmul.default, real(3), real(2, 3, 5)),
            call(aten.matmul.default, real(2, 5, 3), real(3)),
            call(aten.matmul.default, real(2, 1, 5, 3), real(6, 3, 4)),
        ],
        "mm": [call(aten.mm.default, real(3, 5), real(5, 2))],
        "bmm": [call(aten.bmm.default, real(2, 3, 5), real(2, 5, 4))],
        "mv": [call(aten.mv.default, real(3, 5), real(5))],
        "dot": [call(aten.dot.default, real(5), real(5))],
        "vdot": [call(aten.vdot.default, real(5), real(5))],
        "inner": [
            call(aten.inner.default, real(5), real(5)),
            call(aten.inner.default, real(2, 5), real(3, 5)),
        ],
        "outer": [call(aten.outer.default, real(3), real(5))],
        "addmm": [
            call(aten.addmm.default, real(2), real(3, 5), real(5, 2)),
            call(aten.addmm.default, real(3, 1), real(3, 5), real(5, 2), alpha=2.0, beta=0.5),
        ],
        "baddbmm": [call(aten.baddbmm.default, real(3, 4), real(2, 3, 5), real(2, 5, 4))],
        "bilinear": [call(aten.bilinear.default, real(2, 3), real(2, 4), real(5, 3, 4), real(5))],
    }


def _conv() -> dict[str, list[Example]]:
    image = (2, 4, 5, 6)
    one, none = [1, 1], [0, 0]
    return {
        "conv1d": [
            call(aten.conv1d.default, real(2, 4, 7), real(3, 4, 2), real(3)),
            call(aten.conv1d.default, real(4, 7), real(4, 1, 2), None, [2], [1], [1], 4),
            call(aten.conv1d.padding, real(2, 4, 7), real(3, 4, 3), None, [1], "same"),
        ],
        "conv2d": [
            call(aten.conv2d.default, real(*image), real(3, 4, 2, 3), real(3)),
            call(aten.conv2d.default, real(*image), real(6, 2, 3, 2), real(6), one, none, one, 2),
            call(aten.conv2d.default, real(*image), real(4, 1, 3, 2), real(4), one, one, one, 4),
            call(aten.conv2d.default, real(*image), real(8, 1, 3, 2), real(8), one, one, one, 4),
            call(aten.conv2d.default, real(*image), real(3, 4, 1, 1), real(3)),
            call(aten.conv2d.default, real(*image), real(3, 4, 1, 1), real(3), [2, 2]),
            call(aten.conv2d.default, real(2, 3, 6, 8), real(5, 3, 3, 2), None, [3, 2]),
            call(aten.conv2d.default, real(1, 4, 3, 3), real(2, 4, 1, 1), None, [2, 2], [1, 1]),
        ],
        "conv3d": [call(aten.conv3d.default, real(1, 2, 4, 5, 6), real(3, 2, 2, 3, 2))],
        "convolution": [
            call(
                aten.convolution.default,
                real(*image),
                real(6, 2, 2, 3),
                real(6),
                one,
                none,
                one,
                False,
                none,
                2,
            ),
            call(
                aten.convolution.default,
                real(*image),
                real(4, 3, 2, 3),
                real(6),
                one,
                none,
                one,
                True,
                none,
                2,
            ),
        ],
        "conv_transpose1d": [call(aten.conv_transpose1d.default, real(2, 4, 5), real(4, 3, 2), real(3))],
        "conv_transpose2d": [
            call(aten.conv_transpose2d.input, real(*image), real(4, 3, 2, 3), real(6), one, none, none, 2),
            call(aten.conv_transpose2d.input, real(*image), real(4, 1, 2, 3), None, [2, 2], none, none, 4),
            call(aten.conv_transpose2d.input, real(1, 4, 3, 3), real(4, 2, 1, 1), None, [2, 2], [1, 1]),
        ],
        "conv_transpose3d": [call(aten.conv_transpose3d.input, real(1, 2, 3, 4, 5), real(2, 3, 2, 2, 2))],
        "max_pool1d": [call(aten.max_pool1d.default, real(2, 4, 7), [2])],
        "avg_pool1d": [call(aten.avg_pool1d.default, real(2, 4, 7), [3], [1])],
        "adaptive_avg_pool1d": [call(aten.adaptive_avg_pool1d.default, real(2, 4, 7), [3])],
        "max_pool2d": [call(aten.max_pool2d.default, real(*image), [2, 2], [1, 1])],
        "avg_pool2d": [call(aten.avg_pool2d.default, real(*image), [2, 2], [1, 1])],
        "adaptive_avg_pool2d": [
            call(aten.adaptive_avg_pool2d.default, real(*image), [2, 4]),
            call(aten.adaptive_avg_pool2d.default, real(*image), [1, 1]),
        ],
        "_adaptive_avg_pool2d": [call(aten._adaptive_avg_pool2d.default, real(*image), [2, 4])],
        "max_pool3d": [call(aten.max_pool3d.default, real(2, 3, 4, 5, 6), [2, 2, 2], [1, 1, 1])],
        "avg_pool3d": [call(aten.avg_pool3d.default, real(2, 3, 4, 5, 6), [2, 2, 2], [1, 1, 1])],
        "adaptive_avg_pool3d": [call(aten.adaptive_avg_pool3d.default, real(2, 3, 4, 5, 6), [2, 3, 4])],
        "_adaptive_avg_pool3d": [call(aten._adaptive_avg_pool3d.default, real(2, 3, 4, 5, 6), [2, 3, 4])],
        "max_pool2d_with_indices": [call(aten.max_pool2d_with_indices.default, real(*image), [2, 2], [1, 1])],
        "adaptive_max_pool2d": [call(aten.adaptive_max_pool2d.default, real(*image), [2, 4])],
        "upsample_nearest1d": [call(aten.upsample_nearest1d.default, real(2, 4, 3), [6])],
        "upsample_linear1d": [call(aten.upsample_linear1d.default, real(2, 3, 4), [7], False)],
        "upsample_nearest2d": [call(aten.upsample_nearest2d.default, real(2, 4, 3, 5), [6, 7])],
        "upsample_bilinear2d": [call(aten.upsample_bilinear2d.default, real(2, 3, 4, 5), [7, 9], True)],
        "upsample_bicubic2d": [call(aten.upsample_bicubic2d.default, real(2, 3, 4, 5), [7, 9], False)],
        "_upsample_bilinear2d_aa": [
            call(aten._upsample_bilinear2d_aa.default, real(2, 3, 4, 5), [7, 9], False)
        ],
        "_upsample_bicubic2d_aa": [
            call(aten._upsample_bicubic2d_aa.default, real(2, 3, 4, 5), [7, 9], False)
        ],
        "_upsample_nearest_exact2d": [call(aten._upsample_nearest_exact2d.default, real(2, 4, 3, 5), [6, 7])],
    }


def _reduce() -> dict[str, list[Example]]:
    found = {}
    for name in ("amax", "amin"):
        found[name] = [call(getattr(aten, name).default, real(2, 3, 5), [1], True)]
    for name in ("mean", "sum"):
        found[name] = [
            call(getattr(aten, name).default, real(3, 5)),
            call(getattr(aten, name).dim, real(2, 3, 5), [0, -1]) if name == "mean"
            else call(aten.sum.dim_IntList, real(2, 3, 5), [0, -1]),
        ]  # fmt: skip
    found["prod"] = [call(aten.prod.dim_int, real(3, 5), 1), call(aten.prod.default, real(3, 5))]
    found["logsumexp"] = [call(aten.logsumexp.default, real(2, 3, 5), [1, 2], True)]
    found["nansum"] = [call(aten.nansum.default, real(3, 5).where(truth(3, 5), torch.nan), [1])]
    for name in ("all", "any"):
        found[name] = [
            call(getattr(aten, name).dim, Free(truth(4, 5)), 1),
            call(getattr(aten, name).default, Free(truth(4, 5))),
        ]
    for name in ("var", "std", "var_mean", "std_mean"):
        operator = getattr(aten, name)
        found[name] = [
            call(operator.correction, real(2, 3, 5), [-1], correction=0, keepdim=True),
            call(operator.dim, real(2, 3, 5), [0, 1], False),
            call(operator.default, real(3, 5), False),
        ]
    found["linalg_vector_norm"] = [call(aten.linalg_vector_norm.default, real(2, 3, 5), 2, [1], True)]
    found["norm"] = [
        call(aten.norm.ScalarOpt_dim, real(2, 3, 5), 2, [1], True),
        call(aten.norm.Scalar, real(3, 5), 1),
    ]
    for name in ("max", "min"):
        operator = getattr(aten, name)
        found[name] = [
            call(operator.default, real(3, 5)),
            call(operator.dim, real(2, 3, 5), 1, True),
            call(operator.other, real(3, 5), real(5)),
        ]
    for name in ("argmax", "argmin"):
        operator = getattr(aten, name)
        found[name] = [call(operator.default, real(3, 5), 1, True), call(operator.default, real(3, 5))]
    for name in ("softmax", "log_softmax"):
        found[name] = [call(getattr(aten, name).int, real(2, 3, 5), 1)]
    for name in ("_softmax", "_log_softmax"):
        found[name] = [call(getattr(aten, name).default, real(2, 3, 5), -1, False)]
    found["_safe_softmax"] = [call(aten._safe_softmax.default, real(2, 3, 5), -1)]
    for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"):
        found[name] = [call(getattr(aten, name).default, real(3, 5), 0)]
    found["sort"] = [
        call(aten.sort.default, real(3, 5)),
        call(aten.sort.stable, real(3, 5), stable=True, dim=0, descending=True),
    ]
    found["argsort"] = [call(aten.argsort.default, real(3, 5), 0)]
    found["topk"] = [call(aten.topk.default, real(3, 5), 2), call(aten.topk.default, real(5, 3), 2, 0)]
    return found


def _norm() -> dict[str, list[Example]]:
    return {
        "layer_norm": [
            call(aten.layer_norm.default, real(4, 3, 5), [5], real(5), real(5)),
            call(aten.layer_norm.default, real(4, 3, 5), [3, 5], real(3, 5)),
            call(aten.layer_norm.default, real(4, 5), [5]),
        ],
        "rms_norm": [call(aten.rms_norm.default, real(4, 3, 5), [5], real(5), 1e-6)],
        "native_layer_norm": [
            call(aten.native_layer_norm.default, real(4, 3, 5), [5], real(5), real(5), 1e-5)
        ],
        "_fused_rms_norm": [call(aten._fused_rms_norm.default, real(4, 3, 5), [5], real(5), 1e-6)],
        "batch_norm": [
            call(aten.batch_norm.default, real(2, 4, 3), real(4), real(4), real(4), positive(4),
                 False, 0.1, 1e-5, False),
            call(aten.batch_norm.default, real(2, 4, 3), None, None, real(4), positive(4),
                 False, 0.1, 1e-5, False),
        ],
        "_native_batch_norm_legit_no_training": [
            call(aten._native_batch_norm_legit_no_training.default, real(2, 4, 3), real(4), real(4), real(4),
                 positive(4), 0.1, 1e-5),
        ],
        "group_norm": [
            call(aten.group_norm.default, real(2, 6, 5), 2, real(6), real(6)),
            call(aten.group_norm.default, real(2, 4, 3, 5), 1),
            call(aten.group_norm.default, real(2, 4, 5), 4, real(4)),
        ],
        "instance_norm": [
            call(aten.instance_norm.default, real(2, 4, 3, 5), real(4), real(4), None, None,
                 True, 0.1, 1e-5, False),
            call(aten.instance_norm.default, real(2, 4, 3, 5), real(4), real(4), real(4), positive(4),
                 False, 0.1, 1e-5, False),
        ],
    }  # fmt: skip


def _attention() -> dict[str, list[Example]]:
    operator = aten.scaled_dot_product_attention.default
    plain = (real(2, 4, 3, 5), real(2, 4, 6, 5), real(2, 4, 6, 7))
    return {
        "scaled_dot_product_attention": [
            call(operator, *plain),
            call(operator, *plain, truth(3, 6) | (torch.arange(6) == 0)),
            call(operator, *plain, real(2, 1, 3, 6)),
            call(operator, real(2, 4, 6, 5), real(2, 4, 6, 5), real(2, 4, 6, 7), None, 0.0, True),
            call(operator, real(2, 6, 3, 5), real(2, 2, 4, 5), real(2, 2, 4, 7), enable_gqa=True),
            call(operator, real(3, 5), real(6, 5), real(6, 7)),
        ]
    }


def _index() -> dict[str, list[Example]]:
    return {
        "embedding": [call(aten.embedding.default, real(4, 5), INDICES)],
        "index": [
            call(aten.index.Tensor, real(5, 4, 2), [None, INDICES]),
            call(aten.index.Tensor, real(4, 3, 5), [PICKED, PICKED.flip(0) % 3]),
            call(aten.index.Tensor, real(4, 3, 5), [INDICES, None, INDICES]),
            call(aten.index.Tensor, real(3, 5), [torch.tensor([True, False, True])]),
            call(aten.index.Tensor, real(3, 5), [torch.tensor([True, True, True])]),
            call(aten.index.Tensor, real(2, 3, 5), [torch.eye(2, 3) < 0.5]),
        ],
        "_unsafe_index": [call(aten._unsafe_index.Tensor, real(5, 4, 2), [None, INDICES])],
        "index_select": [call(aten.index_select.default, real(5, 4), 1, INDICES.flatten())],
        "gather": [
            call(aten.gather.default, real(2, 4), 1, INDICES),
            call(aten.gather.default, real(3, 4), 1, INDICES),
            call(aten.gather.default, real(3, 4, 5), 2, INDICES.expand(2, 2, 3)),
        ],
        "take_along_dim": [
            call(aten.take_along_dim.default, real(2, 4), INDICES, 1),
            call(aten.take_along_dim.default, real(3, 4), INDICES[:1], 1),
        ],
        "tril": [call(aten.tril.default, real(4, 5))],
        "triu": [call(aten.triu.default, real(2, 4, 4), 1)],
        "einsum": [
            call(aten.einsum.default, "bhid,bhjd->bhij", [real(2, 3, 4, 5), real(2, 3, 6, 5)]),
            call(aten.einsum.default, "ij, jk", [real(3, 4), real(4, 5)]),
            call(aten.einsum.default, "...i,oi->...o", [real(2, 3, 4), real(5, 4)]),
            call(aten.einsum.default, "ij->j", [real(3, 4)]),
        ],
    }  # fmt: skip


def _create() -> dict[str, list[Example]]:
    return {
        "zeros_like": [call(aten.zeros_like.default, real(3, 5))],
        "ones_like": [call(aten.ones_like.default, real(3, 5))],
        "full_like": [call(aten.full_like.default, real(3, 5), 2.0)],
        "new_zeros": [call(aten.new_zeros.default, real(3, 5), [2, 4])],
        "new_ones": [call(aten.new_ones.default, real(3, 5), [2, 4])],
        "new_full": [call(aten.new_full.default, real(3, 5), [2, 4], 2.0)],
        "zeros": [call(aten.zeros.default, [2, 4])],
        "ones": [call(aten.ones.default, [2, 4])],
        "full": [call(aten.full.default, [2, 4], 2.0)],
        "scalar_tensor": [call(aten.scalar_tensor.default, 2.0)],
    }


EXAMPLES: dict[str, list[Example]] = {
    **_unary(), **_binary(), **_view(), **_contract(), **_conv(), **_reduce(), **_norm(), **_attention(),
    **_index(), **_create(),
}  # fmt: skip
