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
        "avg_pool2d": [
            call(aten.avg_pool2d.default, real(*image), [2, 2], [1, 1]),
            call(aten.avg_pool2d.default, real(*image), [2, 1], [1, 1]),
            call(aten.avg_pool2d.default, real(*image), [1], [1]),
        ],
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
        "_native_batch_norm_legit": [
            call(aten._native_batch_norm_legit.no_stats, real(2, 4, 3), real(4), real(4), True, 0.1, 1e-5),
            call(aten._native_batch_norm_legit.no_stats, real(1, 6, 5), None, None, True, 0.1, 1e-5),
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


EXPERTS = torch.tensor([2, 0, 1, 2, 1, 2])  # of six tokens
ENDS = torch.tensor([1, 3, 6], dtype=torch.int32)  # of the groups of tokens, sorted by expert


def _experts() -> dict[str, list[Example]]:
    import transformers.integrations.moe  # noqa: F401 - registers transformers::grouped_mm_fallback

    grouped = torch.ops.transformers.grouped_mm_fallback.default
    rows = EXPERTS[:3, None].expand(3, 4)
    return {
        "one_hot": [call(aten.one_hot.default, EXPERTS, 3)],
        "histc": [call(aten.histc.default, real(3, 5), 4, -2, 2)],
        "bincount": [call(aten.bincount.default, EXPERTS), call(aten.bincount.default, EXPERTS, real(6), 3)],
        "transformers::grouped_mm_fallback": [call(grouped, real(6, 4), real(3, 4, 5), ENDS)],
        "index_add": [
            call(aten.index_add.default, real(3, 5), 0, EXPERTS, real(6, 5)),
            call(aten.index_add.default, real(4, 3), 1, EXPERTS, real(4, 6), alpha=2.0),
        ],
        "index_copy": [call(aten.index_copy.default, real(4, 5), 0, torch.tensor([2, 0]), real(2, 5))],
        "index_reduce": [call(aten.index_reduce.default, real(3, 5), 0, EXPERTS, real(6, 5), "amax")],
        "scatter": [
            call(aten.scatter.src, real(3, 4), 0, rows, real(3, 4)),
            call(aten.scatter.value, real(3, 4), 0, rows, 2.0),
            call(aten.scatter.value, real(3, 4), 0, rows[:, :2], 2.0),
        ],
        "scatter_add": [call(aten.scatter_add.default, real(3, 4), 0, rows, real(3, 4))],
        "scatter_reduce": [call(aten.scatter_reduce.two, real(3, 4), 0, rows, real(3, 4), "amax")],
        "index_put": [
            call(aten.index_put.default, real(3, 5), [EXPERTS], real(6, 5)),
            call(aten.index_put.default, real(5, 3), [None, EXPERTS], real(6), True),
            call(aten.index_put.default, real(3, 5), [EXPERTS, PICKED.repeat(2)[:6]], real(6)),
            call(aten.index_put.default, real(3), [torch.tensor([2, 0, 1])], torch.arange(3.0)),
        ],
    }


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


def _recurrent() -> dict[str, list[Example]]:
    def layer(gates: int, inputs: int, h: int, out: int = 0, biased: bool = True) -> list[Any]:
        found = [real(gates * h, inputs), real(gates * h, out or h)]
        return found + [real(gates * h), real(gates * h)] * biased + [real(out, h)] * bool(out)

    plain = (1, 0.0, False, False, False)  # layers, dropout, train, bidirectional, batch_first
    x, sizes = real(4, 2, 7), torch.tensor([3, 2, 1])
    state, cell = real(1, 2, 3), real(1, 2, 3)
    return {
        "lstm": [
            call(aten.lstm.input, x, [state, cell], layer(4, 7, 3, 0, False), False, *plain),
            call(aten.lstm.input, real(4, 1, 3), [real(1, 1, 2), real(1, 1, 5)], layer(4, 3, 5, 2, False),
                 False, *plain),
            call(aten.lstm.data, real(6, 4), sizes, [real(1, 3, 5), real(1, 3, 5)], layer(4, 4, 5, 0, False),
                 False, *plain[:-1]),
        ],
        "gru": [
            call(aten.gru.input, x, state, layer(3, 7, 3, 0, False), False, *plain),
            call(aten.gru.input, x.transpose(0, 1), state, layer(3, 7, 3), True, *plain[:-1], True),
            call(aten.gru.data, real(6, 4), sizes, real(1, 3, 5), layer(3, 4, 5, 0, False), False,
                 *plain[:-1]),
        ],
        "rnn_tanh": [
            call(aten.rnn_tanh.input, x, real(2, 2, 3), layer(1, 7, 3, 0, False) + layer(1, 3, 3, 0, False),
                 False, 2, *plain[1:]),
            call(aten.rnn_tanh.input, x, real(2, 2, 3), layer(1, 7, 3, 0, False) + layer(1, 7, 3, 0, False),
                 False, 1, 0.0, False, True, False),
        ],
        "rnn_relu": [call(aten.rnn_relu.input, x, state, layer(1, 7, 3), True, *plain)],
        "lstm_cell": [
            call(aten.lstm_cell.default, real(2, 7), [real(2, 5), real(2, 5)], *layer(4, 7, 5, 0, False)),
        ],
        "gru_cell": [
            call(aten.gru_cell.default, real(2, 7), real(2, 5), *layer(3, 7, 5)),
            call(aten.gru_cell.default, real(4, 7), real(4, 5), *layer(3, 7, 5, 0, False)),
        ],
        "rnn_tanh_cell": [call(aten.rnn_tanh_cell.default, real(2, 3), real(2, 5), *layer(1, 3, 5))],
        "rnn_relu_cell": [call(aten.rnn_relu_cell.default, real(2, 3), real(2, 5), *layer(1, 3, 5))],
    }  # fmt: skip


def _fourier() -> dict[str, list[Example]]:
    found = {}
    for name in ("fft", "ifft", "rfft", "ihfft"):
        found[f"fft_{name}"] = [call(getattr(aten, f"fft_{name}").default, real(3, 5), None, 0)]
        found[f"fft_{name}2"] = [call(getattr(aten, f"fft_{name}2").default, real(2, 3, 5))]
        found[f"fft_{name}n"] = [call(getattr(aten, f"fft_{name}n").default, real(2, 3, 5), None, [0, 2])]
    for name in ("hfft", "irfft"):
        found[f"fft_{name}"] = [call(getattr(aten, f"fft_{name}").default, imaginary(3, 5))]
        found[f"fft_{name}2"] = [call(getattr(aten, f"fft_{name}2").default, imaginary(2, 3, 4), [5, 6])]
        found[f"fft_{name}n"] = [call(getattr(aten, f"fft_{name}n").default, imaginary(2, 3, 4), [5, 6])]
    found["fft_fftn"].append(call(aten.fft_fftn.default, real(2, 3)))
    found["_fft_r2c"] = [call(aten._fft_r2c.default, real(3, 5), [1], 0, True)]
    found["_fft_c2r"] = [call(aten._fft_c2r.default, imaginary(3, 5), [1], 0, 8)]
    found["_fft_c2c"] = [call(aten._fft_c2c.default, imaginary(3, 5), [0], 0, True)]
    for name in ("view_as_real", "view_as_real_copy"):
        found[name] = [call(getattr(aten, name).default, imaginary(3, 5))]
    for name in ("view_as_complex", "view_as_complex_copy"):
        found[name] = [call(getattr(aten, name).default, real(3, 5, 2))]
    return found


def imaginary(*shape: int) -> Free:
    """Return random complex numbers."""
    return Free(torch.complex(real(*shape), real(*shape)))


def _windows() -> dict[str, list[Example]]:
    image, volume = (2, 4, 5, 6), (2, 3, 4, 5, 6)
    found = {
        "unfold": [
            call(aten.unfold.default, real(3, 5), 0, 2, 1),
            call(aten.unfold.default, real(3, 6, 5), 1, 2, 2),
        ],
        "unfold_copy": [call(aten.unfold_copy.default, real(3, 5), 1, 2, 1)],
        "im2col": [call(aten.im2col.default, real(*image), [2, 3], [1, 1], [0, 1], [2, 1])],
        "col2im": [call(aten.col2im.default, real(2, 12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1])],
        "grid_sampler": [call(aten.grid_sampler.default, real(*image), real(2, 3, 4, 2), 0, 0, False)],
        "grid_sampler_2d": [call(aten.grid_sampler_2d.default, real(*image), real(2, 3, 4, 2), 0, 1, True)],
        "grid_sampler_3d": [
            call(aten.grid_sampler_3d.default, real(2, 4, 3, 2, 2), real(2, 3, 2, 4, 3), 0, 0, False)
        ],
        "upsample_nearest3d": [call(aten.upsample_nearest3d.default, real(1, 2, 2, 3, 2), [3, 5, 4])],
        "upsample_trilinear3d": [
            call(aten.upsample_trilinear3d.default, real(1, 2, 2, 3, 2), [3, 5, 4], False)
        ],
        "_upsample_nearest_exact1d": [call(aten._upsample_nearest_exact1d.default, real(2, 3, 4), [6])],
        "_upsample_nearest_exact3d": [
            call(aten._upsample_nearest_exact3d.default, real(1, 2, 2, 3, 2), [3, 5, 4])
        ],
        "adaptive_max_pool1d": [call(aten.adaptive_max_pool1d.default, real(2, 4, 7), [3])],
        "adaptive_max_pool3d": [call(aten.adaptive_max_pool3d.default, real(*volume), [2, 3, 4])],
        "max_pool1d_with_indices": [call(aten.max_pool1d_with_indices.default, real(2, 4, 7), [3], [1])],
        "max_pool3d_with_indices": [
            call(aten.max_pool3d_with_indices.default, real(*volume), [2, 2, 2], [1, 1, 1])
        ],
        "fractional_max_pool2d": [
            call(aten.fractional_max_pool2d.default, real(*image), [2, 2], [3, 4], positive(2, 4, 2))
        ],
        "fractional_max_pool3d": [
            call(aten.fractional_max_pool3d.default, real(2, 3, 5, 6, 7), [2] * 3, [3] * 3, positive(2, 3, 3))
        ],
        "max_unpool2d": [
            call(aten.max_unpool2d.default, real(2, 3, 2, 2), PLACES.expand(2, 3, 2, 2), [4, 4])
        ],
        "max_unpool3d": [
            call(aten.max_unpool3d.default, real(2, 3, 1, 2, 2), PLACES.expand(2, 3, 1, 2, 2), [1, 4, 4],
                 [1, 2, 2], [0, 0, 0])
        ],
    }  # fmt: skip
    for spatial in (1, 2, 3):
        x, padding = real(2, 3, *(3, 4, 5)[:spatial]), [1, 2, 0, 1, 1, 0][: 2 * spatial]
        for name in (f"reflection_pad{spatial}d", f"replication_pad{spatial}d"):
            found[name] = [call(getattr(aten, name).default, x, padding)]
    return found


PLACES = torch.tensor([[1, 2], [8, 15]])


def _patch() -> dict[str, list[Example]]:
    rows = torch.tensor([[True, False, True], [False, True, True]])
    return {
        "slice_scatter": [
            call(aten.slice_scatter.default, real(3, 6), real(3, 2), 1, 1, 3),
            call(aten.slice_scatter.default, real(5, 3), real(2, 3), 0, -2),
            call(aten.slice_scatter.default, real(3, 6), real(3, 3), 1, 1, 6, 2),
            call(aten.slice_scatter.default, real(3, 5), real(3, 5), 1),
        ],
        "select_scatter": [
            call(aten.select_scatter.default, real(3, 5), real(3), 1, 2),
            call(aten.select_scatter.default, real(3, 4, 5), real(4, 5), 0, -1),
        ],
        "masked_scatter": [
            call(aten.masked_scatter.default, real(2, 3, 5), rows[..., None], real(4, 5)),
            call(aten.masked_scatter.default, real(2, 3), rows, real(4)),
        ],
        "diagonal": [
            call(aten.diagonal.default, real(4, 4, 3)),
            call(aten.diagonal.default, real(3, 4, 4), 1, 1, 2),
            call(aten.diagonal.default, real(3, 4, 5), 0, -2, -1),
        ],
        "diagonal_copy": [call(aten.diagonal_copy.default, real(3, 4, 4), 0, 2, 1)],
        "linalg_diagonal": [call(aten.linalg_diagonal.default, real(4, 4, 3), offset=0, dim1=0, dim2=1)],
        "diag_embed": [
            call(aten.diag_embed.default, real(3, 5)),
            call(aten.diag_embed.default, real(3, 4), 1, 0, 2),
        ],
    }


def _fused_attention() -> dict[str, list[Example]]:
    packed, out = (real(18, 6), real(18)), (real(6, 6), real(6))
    q, k, v = real(2, 3, 6), real(2, 3, 6), real(2, 3, 6)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    feed_forward = (real(6), real(6), real(6), real(6), real(7, 6), real(7), real(6, 7), real(6))
    attend = aten._native_multi_head_attention.default
    return {
        "_native_multi_head_attention": [
            call(attend, q, q, q, 6, 2, *packed, *out),
            call(attend, q, k, v, 6, 3, *packed, *out, None, True, False),
            call(attend, q, q, q, 6, 2, *packed, *out, mask, False, True, 1),
        ],
        "_transformer_encoder_layer_fwd": [
            call(aten._transformer_encoder_layer_fwd.default, q, 6, 2, *packed, *out, gelu, first, 1e-5,
                 *feed_forward)
            for gelu, first in ((True, True), (False, False))
        ],
    }  # fmt: skip


def _special() -> dict[str, list[Example]]:
    """Examples of further rules of the families above; behind them, so that those keep their numbers."""
    found = {}
    for name in [
        "angle",
        "conj_physical",
        "_conj_physical",
        "resolve_conj",
        "resolve_neg",
        "i0",
        "special_erfcx",
        "special_i0e",
        "special_i1",
        "special_i1e",
        "special_log_ndtr",
        "special_bessel_j0",
        "special_bessel_j1",
        "special_modified_bessel_i0",
        "special_modified_bessel_i1",
        "special_spherical_bessel_j0",
        "special_airy_ai",
    ]:
        found[name] = [call(getattr(aten, name).default, real(2, 5) * 3)]
    for name in [
        "logit",
        "special_ndtri",
        "special_entr",
        "special_bessel_y0",
        "special_bessel_y1",
        "special_modified_bessel_k0",
        "special_modified_bessel_k1",
        "special_scaled_modified_bessel_k0",
        "special_scaled_modified_bessel_k1",
    ]:
        found[name] = [call(getattr(aten, name).default, positive(2, 5))]
    found["mvlgamma"] = [call(aten.mvlgamma.default, positive(2, 5) + 2, 2)]
    found["_conj"] = [call(aten._conj.default, imaginary(2, 5))]
    found["_neg_view"] = [call(aten._neg_view.default, real(2, 5))]
    found["frexp"] = [call(aten.frexp.Tensor, real(2, 5))]
    for name in ("complex", "polar", "heaviside"):
        found[name] = [call(getattr(aten, name).default, real(3, 5).round(), real(5).expand(3, 5))]
    for name in ("igamma", "igammac", "special_xlog1py"):
        found[name] = [call(getattr(aten, name).default, positive(3, 5), positive(5))]
    found["special_zeta"] = [call(aten.special_zeta.default, positive(3, 5) + 2, positive(5))]
    found["polygamma"] = [call(aten.polygamma.default, 1, positive(3, 5))]
    for name in ("gcd", "lcm"):
        found[name] = [call(getattr(aten, name).default, whole(3, 5), whole(5))]
    for name in ("kthvalue", "median", "nanmedian", "mode"):
        operator, rank = getattr(aten, name), [2] if name == "kthvalue" else []
        overload = operator.default if name in ("kthvalue", "mode") else operator.dim
        x = (positive(2, 3, 5) * 4).round() if name == "mode" else real(2, 3, 5)
        found[name] = [call(overload, x, *rank, 1, True), call(overload, x, *rank, -2)]
        if overload is not operator.default:
            found[name].append(call(operator.default, real(3, 5)))
    found["count_nonzero"] = [
        call(aten.count_nonzero.dim_IntList, real(3, 4, 5).relu(), [1]),
        call(aten.count_nonzero.default, real(3, 5).relu()),
    ]
    return found


def _more() -> dict[str, list[Example]]:
    return {
        "embedding_bag": [
            call(aten.embedding_bag.default, real(4, 5), INDICES.flatten(), torch.tensor([0, 2])),
            call(aten.embedding_bag.default, real(4, 5), INDICES.flatten(), torch.tensor([0, 2]), False, 2),
        ],
        "_embedding_bag": [
            call(aten._embedding_bag.default, real(4, 5), INDICES.flatten(), torch.tensor([0, 2]),
                 False, 0, False, real(6)),
        ],
        "_embedding_bag_forward_only": [
            call(aten._embedding_bag_forward_only.default, real(4, 5), PICKED, torch.tensor([0, 4])),
        ],
        "bucketize": [call(aten.bucketize.Tensor, real(3, 5), torch.tensor([-1.0, 0.0, 0.5]))],
        "searchsorted": [
            call(aten.searchsorted.Tensor, torch.tensor([-1.0, 0.0, 0.5]), real(3, 5)),
            call(aten.searchsorted.Tensor, real(3, 4).sort().values, real(3, 5)),
        ],
        **{
            name: [call(getattr(aten, name).default, real(2, 3, 5), real(2, 4, 5), *rest)]
            for name, rest in {"cdist": [], "_cdist_forward": [1.0, None]}.items()
        },
        "addbmm": [call(aten.addbmm.default, real(4), real(2, 3, 5), real(2, 5, 4), beta=0.5)],
        "_euclidean_dist": [call(aten._euclidean_dist.default, real(2, 3, 5), real(2, 4, 5))],
        "fill": [call(aten.fill.Scalar, real(2, 4), 2.0)],
    }  # fmt: skip


EXAMPLES: dict[str, list[Example]] = {
    **_unary(), **_binary(), **_view(), **_contract(), **_conv(), **_reduce(), **_norm(), **_attention(),
    **_index(), **_experts(), **_create(), **_recurrent(), **_fourier(), **_windows(), **_patch(),
    **_fused_attention(), **_special(), **_more(),
}  # fmt: skip
EXAMPLES["einsum"] += [
    call(aten.einsum.default, "iij->ij", [real(3, 3, 4)]),
    call(aten.einsum.default, "ij,...ii->j...", [real(3, 4), real(2, 5, 3, 3)]),
    call(aten.einsum.default, "b...d,b...e", [real(2, 3, 4), real(2, 3, 5)]),
]
