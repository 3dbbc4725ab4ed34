"""Draw calls of every operator that has a rule: random shapes, axes, flags and optional arguments.

A call is a description (:class:`OperatorCall`) in which tensors are only named by kind and shape, so that it
prints and shrinks. Makers are registered by name, one per family of operators; whoever adds a rule adds the
operator's name to one of them, or a maker.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxfusion.errors import OptionError
from fxfusion.testing.choices import Choices, strategy_of
from fxfusion.testing.rule_check import Free

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SIZES = (2, 3, 4, 1, 5, 6)


def _words(text: str) -> list[str]:
    return text.split()


MANY = (1 << 63) - 1  # an end of a slice that means the end of the axis

UNDEFINED = "the values of its output are not defined"
EXEMPT: dict[str, str] = {
    "empty": UNDEFINED,
    "empty_like": UNDEFINED,
    "new_empty": UNDEFINED,
    "empty_strided": UNDEFINED,
    "empty_permuted": UNDEFINED,
    "new_empty_strided": UNDEFINED,
    "_grouped_mm": "it refuses float64; transformers::grouped_mm_fallback has the same rule",
    "cudnn_grid_sampler": "it runs on a GPU only; grid_sampler has the same rule",
}


@dataclasses.dataclass(frozen=True)
class Values:
    """A tensor by kind and shape.

    Attributes
    ----------
    kind : str
        A function of :class:`_Kinds`.
    shape : tuple of int
    limit : int
        Integers are below it.
    """

    kind: str
    shape: tuple[int, ...]
    limit: int = 0

    def make(self, generator: torch.Generator) -> torch.Tensor | Free:
        """Return a random tensor of the kind."""
        made: torch.Tensor | Free = getattr(_Kinds, self.kind)(self.shape, self.limit, generator)
        return made

    def __repr__(self) -> str:
        limit = f", below {self.limit}" if self.limit else ""
        return f"<{self.kind} {list(self.shape)}{limit}>"


class _Kinds:
    """What the kinds of tensors hold."""

    @staticmethod
    def real(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    @staticmethod
    def scaled(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return _Kinds.real(shape, limit, generator) * 3

    @staticmethod
    def positive(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1

    @staticmethod
    def large(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return _Kinds.positive(shape, limit, generator) * 2 + 1.1

    @staticmethod
    def rounded(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return (_Kinds.positive(shape, limit, generator) * 5).round() + 1

    @staticmethod
    def missing(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        drawn = _Kinds.real(shape, limit, generator)
        return drawn.where(torch.rand(shape, generator=generator) < 0.7, torch.nan)

    @staticmethod
    def infinite(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        drawn = _Kinds.real(shape, limit, generator)
        return drawn.where(torch.rand(shape, generator=generator) < 0.7, torch.inf)

    @staticmethod
    def complex(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)

    @staticmethod
    def whole(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Free:
        return Free(torch.randint(1, limit, shape, generator=generator))

    @staticmethod
    def halves(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Free:
        return Free(torch.randint(1, limit, shape, generator=generator, dtype=torch.int32))

    @staticmethod
    def truth(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Free:
        return Free(torch.rand(shape, generator=generator) < 0.5)

    @staticmethod
    def mask(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.rand(shape, generator=generator) < 0.5
        if drawn.ndim:
            drawn[..., 0] = True
        return drawn

    @staticmethod
    def index(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(limit, shape, generator=generator)

    @staticmethod
    def order(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(limit, generator=generator)[: math.prod(shape)].reshape(shape)

    @staticmethod
    def sorted(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return _Kinds.real(shape, limit, generator).sort(-1).values

    @staticmethod
    def ends(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        ends = torch.randint(limit + 1, shape, generator=generator).sort().values
        ends[-1] = limit
        return ends.int()

    @staticmethod
    def starts(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(limit, shape, generator=generator).sort().values
        starts[0] = 0
        return starts

    @staticmethod
    def grid(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 1.8 - 0.9


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """One call of an operator.

    Attributes
    ----------
    name : str
        Of the operator with its overload, such as ``aten::linear.default``.
    args, kwargs : tuple, dict
        Arguments, tensors as :class:`Values`.
    seed : int
        Draws the tensors.

    Examples
    --------
    >>> call = OperatorCall("aten::relu.default", (Values("real", (2, 3)),))
    >>> call
    aten::relu.default(<real [2, 3]>)  # seed 0
    >>> call.check().ok
    True
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def operator(self) -> Any:
        """The operator itself."""
        namespace, _, rest = self.name.partition("::")
        name, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with random tensors, always the same."""
        generator = torch.Generator().manual_seed(self.seed)
        args = tuple(_made(item, generator) for item in self.args)
        return args, {name: _made(item, generator) for name, item in self.kwargs.items()}

    def check(self, thorough: bool = False) -> Any:
        """Hold the operator's rule against this call, see :func:`fxfusion.testing.check_rule`."""
        from fxfusion.testing.rule_check import check_rule

        args, kwargs = self.arguments()
        return check_rule(self.operator, args, kwargs, self.seed, thorough=thorough)

    def __repr__(self) -> str:
        given = [repr(item) for item in self.args] + [f"{key}={item!r}" for key, item in self.kwargs.items()]
        return f"{self.name}({', '.join(given)})  # seed {self.seed}"


def _made(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Values):
        return value.make(generator)
    if isinstance(value, (list, tuple)):
        return [_made(item, generator) for item in value]
    return value


# -- the table ------------------------------------------------------------------------------------

Maker = Callable[[Choices, str], OperatorCall]
MAKERS: dict[str, Maker] = {}


def _makes(*names: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        for name in _words(" ".join(names)):
            MAKERS[name] = maker
        return maker

    return register


def operator_calls(name: str) -> SearchStrategy[OperatorCall]:
    """Return a hypothesis strategy that draws calls of an operator.

    Parameters
    ----------
    name : str
        As the operator's rule is registered: ``linear``, ``transformers::grouped_mm_fallback``.

    Raises
    ------
    OptionError
        If calls of the operator cannot be drawn.
    MissingDependencyError
        If hypothesis is not installed.

    Examples
    --------
    >>> import hypothesis
    >>> @hypothesis.settings(max_examples=5, database=None, derandomize=True)
    ... @hypothesis.given(operator_calls("linear"))
    ... def test(call):
    ...     assert call.check().ok
    >>> test()
    """
    if name not in MAKERS:
        reason = EXEMPT.get(name, "it has no maker in fxfusion.testing.random_calls")
        raise OptionError(f"calls of {name} cannot be drawn: {reason}")
    return strategy_of(functools.partial(draw_call, name=name))


def draw_call(choices: Choices, name: str) -> OperatorCall:
    """Draw one call."""
    made = MAKERS[name](choices, name)
    return dataclasses.replace(made, seed=choices.whole(0, 1 << 16))


def _call(name: str, overload: str, *args: Any, **kwargs: Any) -> OperatorCall:
    full = name if "::" in name else f"aten::{name}"
    return OperatorCall(f"{full}.{overload}", args, kwargs)


# -- drawing arguments ----------------------------------------------------------------------------


def _shape(choices: Choices, low: int = 1, high: int = 3) -> list[int]:
    return [choices.of(SIZES) for _ in range(choices.whole(low, high))]


def _axis(choices: Choices, rank: int) -> int:
    axis = choices.whole(0, rank - 1)
    return axis - rank if choices.flag() else axis


def _axes(choices: Choices, rank: int) -> list[int]:
    """Draw at least one axis, all different, of either sign."""
    chosen = [axis for axis in range(rank) if choices.flag()] or [choices.whole(0, rank - 1)]
    return [axis - rank if choices.flag() else axis for axis in chosen]


def _narrower(choices: Choices, shape: Sequence[int]) -> list[int]:
    """Draw a shape that broadcasts to another one."""
    kept = list(shape[choices.whole(0, len(shape)) :])
    return [1 if choices.flag() else size for size in kept]


def _of(kind: str, shape: Sequence[int], limit: int = 0) -> Values:
    return Values(kind, tuple(shape), limit)


def _real(*shape: int) -> Values:
    return Values("real", shape)


def _maybe(choices: Choices, value: Any) -> Any:
    return value if choices.flag() else None


# -- element-wise ---------------------------------------------------------------------------------

_INSIDE = _words(
    "acos asin atanh digamma erfinv lgamma log log10 log1p log2 rsqrt sqrt logit special_ndtri "
    "special_log_ndtr special_bessel_y0 special_bessel_y1 special_modified_bessel_k0 "
    "special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
    "special_entr special_airy_ai special_spherical_bessel_j0"
)
_UNARY_KINDS: dict[str, str] = {
    **dict.fromkeys(_INSIDE, "positive"),
    "acosh": "large",
    "mvlgamma": "large",
    "isnan": "missing",
    "nan_to_num": "missing",
    "isinf": "infinite",
    "isfinite": "infinite",
    "bitwise_not": "whole",
    **dict.fromkeys(_words("conj_physical _conj _conj_physical resolve_conj resolve_neg angle"), "complex"),
}
_UNARY_EXTRAS: dict[str, tuple[Any, ...]] = {
    "dropout": (0.5, False),
    "feature_dropout": (0.5, False),
    "native_dropout": (0.5, False),
    "threshold": (0.1, 0.2),
    "mvlgamma": (2,),
    "elu": (1.3,),
    "celu": (1.3,),
    "leaky_relu": (0.2,),
    "hardtanh": (-0.5, 0.7),
    "softplus": (2.0, 1.0),
}
_ALWAYS = ("dropout", "feature_dropout", "native_dropout", "threshold", "mvlgamma")


@_makes(
    "abs acos acosh asin asinh atan atanh bitwise_not ceil celu clone contiguous cos cosh deg2rad detach "
    "digamma dropout elu erf erfc erfinv exp exp2 expm1 feature_dropout floor frac gelu hardshrink "
    "hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma lift_fresh_copy log log10 log1p "
    "log2 log_sigmoid logical_not mish nan_to_num neg positive reciprocal relu relu6 round rsqrt selu sgn "
    "sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square tan tanh threshold trunc alias "
    "native_dropout angle conj_physical _conj _conj_physical resolve_conj resolve_neg _neg_view i0 logit "
    "mvlgamma special_erfcx special_i0e special_i1 special_i1e special_ndtri special_log_ndtr special_entr "
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_airy_ai "
    "special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 "
    "special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
    "special_spherical_bessel_j0"
)
def _unary(choices: Choices, name: str) -> OperatorCall:
    kind = _UNARY_KINDS.get(name, "scaled")
    extras = _UNARY_EXTRAS.get(name, ())
    given = extras if name in _ALWAYS or choices.flag() else ()
    x = _of(kind, _shape(choices, 0, 3), 64 if kind == "whole" else 0)
    return _call(name, "default", x, *given)


@_makes("frexp")
def _frexp(choices: Choices, name: str) -> OperatorCall:
    return _call(name, "Tensor", _of("scaled", _shape(choices, 0, 3)))


@_makes("to _to_copy type_as")
def _cast(choices: Choices, name: str) -> OperatorCall:
    x = _of("real", _shape(choices, 0, 3))
    if name == "_to_copy":
        return _call(name, "default", x, dtype=torch.float64)
    other = _of("real", _shape(choices, 0, 3))
    if name == "type_as":
        return _call(name, "default", x, other)
    return _call(name, "other", x, other) if choices.flag() else _call(name, "dtype", x, torch.float64)


_BINARY_KINDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        _words("__and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor gcd lcm"), ("whole", "whole")
    ),
    **dict.fromkeys(
        _words("__lshift__ __rshift__ bitwise_left_shift bitwise_right_shift"), ("whole", "shift")
    ),
    **dict.fromkeys(_words("logical_and logical_or logical_xor"), ("truth", "truth")),
    **dict.fromkeys(
        _words("div true_divide floor_divide fmod remainder eq ge gt le lt ne"), ("rounded", "rounded")
    ),
    **dict.fromkeys(_words("xlogy special_xlog1py igamma igammac"), ("positive", "positive")),
    "special_zeta": ("large", "positive"),
}
_TENSOR_OVERLOAD = _words(
    "__and__ __or__ __xor__ __lshift__ __rshift__ bitwise_and bitwise_or bitwise_xor bitwise_left_shift "
    "bitwise_right_shift add div fmod ldexp mul remainder rsub sub true_divide eq ge gt le lt ne "
    "copysign xlogy"
)


@_makes(
    "__and__ __or__ __xor__ __lshift__ __rshift__ add atan2 bitwise_and bitwise_or bitwise_xor "
    "bitwise_left_shift bitwise_right_shift copysign div eq floor_divide fmax fmin fmod ge gt hypot ldexp le "
    "logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul ne remainder rsub sub "
    "true_divide xlogy complex polar heaviside igamma igammac special_xlog1py special_zeta gcd lcm"
)
def _binary(choices: Choices, name: str) -> OperatorCall:
    kinds = _BINARY_KINDS.get(name, ("real", "real"))
    shape = _shape(choices, 0, 3)
    shapes = [shape, _narrower(choices, shape)]
    if choices.flag():
        shapes.reverse()
    if choices.flag():  # both broadcast
        shapes[0] = [1 if choices.flag() else size for size in shapes[0]]
    limits = {"whole": 64, "shift": 4}
    x, y = (
        _of("whole" if kind == "shift" else kind, item, limits.get(kind, 0))
        for kind, item in zip(kinds, shapes, strict=True)
    )
    overload = "Tensor" if name in _TENSOR_OVERLOAD else "default"
    if (
        overload == "Tensor"
        and kinds[0] in ("real", "rounded")
        and name not in ("ldexp", "copysign", "rsub")
        and choices.flag()
    ):
        return _call(name, "Scalar", x, 2.0)
    named = {"alpha": 2.0} if name in ("add", "sub", "rsub") and choices.flag() else {}
    return _call(name, overload, x, y, **named)


@_makes("polygamma")
def _polygamma(choices: Choices, name: str) -> OperatorCall:
    return _call(name, "default", choices.whole(1, 3), _of("positive", _shape(choices, 0, 3)))


@_makes("pow")
def _pow(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 0, 3)
    overload = choices.of(("Tensor_Tensor", "Tensor_Scalar", "Scalar"))
    if overload == "Tensor_Tensor":
        return _call(name, overload, _of("positive", shape), _of("real", _narrower(choices, shape)))
    if overload == "Scalar":
        return _call(name, overload, 2, _of("real", shape))
    return _call(name, overload, _of("real", shape), choices.of((2, 3, 1)))


@_makes("addcdiv addcmul lerp where masked_fill")
def _ternary(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    others = [_narrower(choices, shape) for _ in range(2)]
    x, y, z = (_of("positive", item) for item in (shape, *others))
    if name == "lerp":
        return _call(name, "Scalar", x, y, 0.3) if choices.flag() else _call(name, "Tensor", x, y, z)
    if name == "where":
        condition = _of(choices.of(("truth", "mask")), shape)
        return (
            _call(name, "self", condition, y, z)
            if choices.flag()
            else _call(name, "ScalarOther", condition, x, 0.0)
        )
    if name == "masked_fill":
        return _call(name, "Scalar", x, _of(choices.of(("truth", "mask")), others[0]), 0.5)
    return _call(name, "default", x, y, z)


@_makes("clamp clamp_max clamp_min")
def _clamp(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 0, 3)
    x = _of("real", shape)
    count = 2 if name == "clamp" else 1
    if choices.flag():
        return _call(name, "Tensor", x, *(_of("real", _narrower(choices, shape)) for _ in range(count)))
    return _call(name, "default", x, *(-0.5, 0.5)[:count])


@_makes("copy")
def _copy(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 0, 3)
    return _call(name, "default", _of("real", shape), _of("real", _narrower(choices, shape)))


@_makes("prelu rrelu rrelu_with_noise")
def _prelu(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 2, 3)
    x = _of("real", shape)
    if name == "prelu":
        return _call(name, "default", x, _of("positive", [choices.of((shape[1], 1))]))
    return _call(name, "default", x, x) if name == "rrelu_with_noise" else _call(name, "default", x)


@_makes("glu")
def _glu(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    shape[axis] *= 2
    return _call(name, "default", _of("real", shape), axis)


# -- views ----------------------------------------------------------------------------------------


def _regrouped(choices: Choices) -> tuple[list[int], list[int]]:
    """Draw two shapes of one number of elements, factors grouped in different ways."""
    primes = [choices.of((2, 3, 2)) for _ in range(choices.whole(1, 4))]

    def grouped() -> list[int]:
        sizes, current = [], 1
        for prime in primes:
            current *= prime
            if choices.flag():
                sizes.append(current)
                current = 1
        return [*sizes, current]

    return grouped(), grouped()


@_makes("view reshape _unsafe_view view_copy")
def _view(choices: Choices, name: str) -> OperatorCall:
    before, after = _regrouped(choices)
    if name == "view" and choices.flag():
        if before[-1] % 2 == 0 and choices.flag():
            return _call(name, "dtype", _of("halves", before, 64), torch.int64)
        return _call(name, "dtype", _of("real", before), torch.int64)
    if choices.flag():
        after = [-1, *after[1:]]
    return _call(name, "default", _of("real", before), after)


@_makes("flatten")
def _flatten(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    first = choices.whole(0, len(shape) - 1)
    return _call(name, "using_ints", _of("real", shape), first, choices.whole(first, len(shape) - 1))


@_makes("unflatten")
def _unflatten(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    factors = [choices.of(SIZES) for _ in range(choices.whole(1, 3))]
    shape[axis] = math.prod(factors)
    if choices.flag():
        factors[0] = -1
    return _call(name, "int", _of("real", shape), axis, factors)


@_makes("squeeze unsqueeze")
def _squeeze(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    if name == "unsqueeze":
        return _call(name, "default", _of("real", shape), axis)
    if choices.flag():
        shape[axis] = 1
    if choices.flag():
        return _call(name, "dims", _of("real", shape), [axis])
    return _call(name, "dim", _of("real", shape), axis)


def _order(choices: Choices, rank: int) -> list[int]:
    left, order = list(range(rank)), []
    while left:
        order.append(left.pop(choices.whole(0, len(left) - 1)))
    return order


@_makes("permute permute_copy")
def _permute(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    order = [axis - len(shape) if choices.flag() else axis for axis in _order(choices, len(shape))]
    return _call(name, "default", _of("real", shape), order)


@_makes("transpose swapaxes transpose_copy")
def _transpose(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    overload = "default" if name == "swapaxes" else "int"
    return _call(name, overload, _of("real", shape), _axis(choices, len(shape)), _axis(choices, len(shape)))


@_makes("numpy_T t mT adjoint")
def _turned(choices: Choices, name: str) -> OperatorCall:
    low, high = {"numpy_T": (2, 2), "t": (1, 2)}.get(name, (2, 4))
    return _call(name, "default", _of("real", _shape(choices, low, high)))


@_makes("movedim moveaxis")
def _movedim(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    rank = len(shape)
    if choices.flag():
        count = choices.whole(1, rank)
        sources, places = _order(choices, rank)[:count], _order(choices, rank)[:count]
        return _call(name, "intlist", _of("real", shape), sources, places)
    return _call(name, "int", _of("real", shape), _axis(choices, rank), _axis(choices, rank))


@_makes("expand broadcast_to expand_copy expand_as")
def _expand(choices: Choices, name: str) -> OperatorCall:
    after = _shape(choices, 1, 4)
    before = _narrower(choices, after)
    if name == "expand_as":
        return _call(name, "default", _of("real", before), _of("real", after))
    sizes = list(after)
    for place in range(len(before)):
        if before[-1 - place] == after[-1 - place] and choices.flag():
            sizes[-1 - place] = -1
    return _call(name, "default", _of("real", before), sizes)


@_makes("repeat tile")
def _repeat(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    extra = choices.whole(0, 1) if name == "repeat" else choices.whole(-len(shape) + 1, 1)
    times = [choices.of((2, 1, 3)) for _ in range(len(shape) + extra)]
    return _call(name, "default", _of("real", shape), times)


@_makes("repeat_interleave")
def _repeat_interleave(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    if choices.flag():
        return _call(name, "self_Tensor", _of("real", shape), _of("index", [shape[axis]], 4), axis)
    return _call(name, "self_int", _of("real", shape), choices.of((2, 1, 3)), _maybe(choices, axis))


@_makes("slice")
def _slice(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    size = shape[axis]
    start = choices.whole(0, size - 1)
    end = choices.whole(start + 1, size)
    first = start - size if choices.flag() else _maybe(choices, start) if start == 0 else start
    last = choices.of((end, end - size or None, MANY)) if end == size else choices.of((end, end - size))
    return _call(name, "Tensor", _of("real", shape), axis, first, last, choices.of((1, 2, 3)))


@_makes("select")
def _select(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    return _call(name, "int", _of("real", shape), axis, choices.whole(-shape[axis], shape[axis] - 1))


@_makes("narrow")
def _narrow(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    start = choices.whole(0, shape[axis] - 1)
    length = choices.whole(1, shape[axis] - start)
    return _call(name, "default", _of("real", shape), axis, start - shape[axis] * choices.flag(), length)


@_makes("split chunk unsafe_split unsafe_chunk split_with_sizes tensor_split unbind")
def _split(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    x = _of("real", shape)
    if name == "unbind":
        return _call(name, "int", x, axis)
    if name == "split_with_sizes":
        sizes = _shape(choices, 1, 3)
        shape[axis] = sum(sizes)
        return _call(name, "default", _of("real", shape), sizes, axis)
    if name == "tensor_split" and choices.flag():
        places = sorted(choices.whole(0, shape[axis]) for _ in range(2))
        return _call(name, "indices", x, places, axis)
    overload = {"chunk": "default", "tensor_split": "sections"}.get(name.removeprefix("unsafe_"), "Tensor")
    if name == "unsafe_chunk":
        overload = "default"
    return _call(name, overload, x, choices.of((2, 3, 1)), axis)


@_makes("cat concat concatenate stack")
def _cat(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    count = choices.whole(1, 3)
    if name == "stack":
        return _call(name, "default", [_of("real", shape)] * count, _axis(choices, len(shape) + 1))
    axis = _axis(choices, len(shape))
    parts = []
    for _ in range(count):
        shape[axis] = choices.of((2, 1, 3, 4))
        parts.append(_of("real", shape))
    if name == "cat" and choices.flag():
        parts.append(_of("real", [0]))
    return _call(name, "default", parts, axis)


@_makes("pad constant_pad_nd")
def _pad(choices: Choices, name: str) -> OperatorCall:
    mode = choices.of(("constant", "reflect", "replicate", "circular")) if name == "pad" else "constant"
    if mode != "constant":
        shape = [choices.of((2, 3)), choices.of((2, 3)), choices.of((3, 4, 5))]
        return _call(name, "default", _of("real", shape), [choices.whole(0, 2), choices.whole(0, 2)], mode)
    shape = _shape(choices, 1, 3)
    padding = []
    for place in range(choices.whole(1, len(shape))):
        shrinks = shape[-1 - place] > 2
        padding += [choices.whole(-1 if shrinks else 0, 2), choices.whole(-1 if shrinks else 0, 2)]
    value = choices.of((0.0, 0.5))
    return _call(
        name, "default", _of("real", shape), padding, *((mode, value) if name == "pad" else (value,))
    )


@_makes("roll flip")
def _roll(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axes = _axes(choices, len(shape))
    if name == "flip":
        return _call(name, "default", _of("real", shape), axes)
    if choices.flag():
        return _call(name, "default", _of("real", shape), [choices.whole(1, 3)])
    return _call(name, "default", _of("real", shape), [choices.whole(1, 3) for _ in axes], axes)


@_makes("slice_scatter select_scatter")
def _scattered(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    x, place, size = _of("real", shape), axis % len(shape), shape[axis]
    start = choices.whole(0, size - 1)
    if name == "select_scatter":
        return _call(name, "default", x, _of("real", shape[:place] + shape[place + 1 :]), axis, start)
    end, step = choices.whole(start + 1, size), choices.of((1, 2))
    shape[axis] = -(-(end - start) // step)
    return _call(name, "default", x, _of("real", shape), axis, start, end, step)


@_makes("masked_scatter")
def _masked_scatter(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    return _call(name, "default", _of("real", shape), _of("mask", shape), _of("real", shape))


@_makes("diagonal diagonal_copy linalg_diagonal diag_embed")
def _diagonal(choices: Choices, name: str) -> OperatorCall:
    if name == "diag_embed":
        shape = _shape(choices, 1, 3)
        return _call(name, "default", _of("real", shape), choices.whole(-1, 1), 0, -1)
    shape = [*_shape(choices, 0, 2), choices.of((2, 3, 4)), choices.of((2, 3, 4))]
    if name == "linalg_diagonal":
        return _call(name, "default", _of("real", shape), offset=choices.whole(-1, 1))
    first = choices.whole(0, len(shape) - 2)
    return _call(name, "default", _of("real", shape), choices.whole(-1, 1), first, len(shape) - 1)


@_makes("tril triu")
def _triangle(choices: Choices, name: str) -> OperatorCall:
    return _call(name, "default", _of("real", _shape(choices, 2, 4)), choices.whole(-1, 2))


@_makes("unfold unfold_copy")
def _unfold(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    return _call(name, "default", _of("real", shape), axis, choices.whole(1, shape[axis]), choices.of((1, 2)))


@_makes("view_as_real view_as_real_copy view_as_complex view_as_complex_copy")
def _complex_view(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    if "as_real" in name:
        return _call(name, "default", _of("complex", shape))
    return _call(name, "default", _of("real", [*shape, 2]))


# -- contractions ---------------------------------------------------------------------------------


@_makes("linear")
def _linear(choices: Choices, name: str) -> OperatorCall:
    leading, inputs, outputs = _shape(choices, 0, 2), choices.of(SIZES), choices.of(SIZES)
    x = _of("real", [*leading, inputs])
    if choices.flag() and choices.flag():
        return _call(name, "default", x, _real(inputs))
    return _call(name, "default", x, _real(outputs, inputs), _maybe(choices, _real(outputs)))


@_makes("matmul")
def _matmul(choices: Choices, name: str) -> OperatorCall:
    batch, i, k, j = _shape(choices, 0, 2), choices.of(SIZES), choices.of(SIZES), choices.of(SIZES)
    left = [k] if choices.flag() else [*_narrower(choices, batch), i, k]
    right = [k] if choices.flag() else [*_narrower(choices, batch), k, j]
    return _call(name, "default", _of("real", left), _of("real", right))


@_makes("mm bmm mv dot vdot inner outer addmm baddbmm addbmm bilinear")
def _multiplied(choices: Choices, name: str) -> OperatorCall:
    b, i, k, j = (choices.of(SIZES) for _ in range(4))
    if name in ("addmm", "baddbmm", "addbmm"):
        lead = [] if name == "addmm" else [b]
        bias = _of("real", _narrower(choices, [*(lead if name == "baddbmm" else []), i, j]))
        named = {"alpha": 2.0, "beta": 0.5} if choices.flag() else {}
        return _call(name, "default", bias, _of("real", [*lead, i, k]), _of("real", [*lead, k, j]), **named)
    if name == "bilinear":
        lead = _shape(choices, 0, 2)
        left, right = _of("real", [*lead, i]), _of("real", [*lead, k])
        return _call(name, "default", left, right, _real(j, i, k), _maybe(choices, _real(j)))
    if name == "inner":
        shapes = [[*_shape(choices, 0, 2), k], [*_shape(choices, 0, 2), k]]
        return _call(name, "default", *(_of("real", shape) for shape in shapes))
    operands = {
        "mm": ([i, k], [k, j]),
        "bmm": ([b, i, k], [b, k, j]),
        "mv": ([i, k], [k]),
        "outer": ([i], [j]),
    }.get(name, ([k], [k]))
    return _call(name, "default", *(_of("real", shape) for shape in operands))


@_makes("einsum")
def _einsum(choices: Choices, name: str) -> OperatorCall:
    sizes = {label: choices.of(SIZES) for label in "abcd"}
    terms = []
    for _ in range(choices.whole(1, 3)):
        order = _order(choices, 4)
        terms.append("".join("abcd"[place] for place in order[: choices.whole(1, 3)]))
    known = sorted(set("".join(terms)))
    result = "".join(label for label in known if choices.flag())
    operands = [_of("real", [sizes[label] for label in term]) for term in terms]
    if choices.flag():
        operands = [_of("real", [2, *item.shape]) for item in operands]
        terms, result = [f"...{term}" for term in terms], f"...{result}"
    arrow = "" if choices.flag() else f"->{result}"
    return _call(name, "default", ",".join(terms) + arrow, operands)


@_makes("cdist _cdist_forward _euclidean_dist")
def _distances(choices: Choices, name: str) -> OperatorCall:
    batch, i, j, k = _shape(choices, 0, 1), choices.of(SIZES), choices.of(SIZES), choices.of(SIZES)
    operands = [_of("real", [*batch, i, k]), _of("real", [*batch, j, k])]
    if name == "_euclidean_dist":
        return _call(name, "default", *operands)
    more = [choices.of((2.0, 1.0, 3.0))] + ([choices.of((None, 2))] if name == "_cdist_forward" else [])
    return _call(name, "default", *operands, *more)


# -- convolutions and windows ---------------------------------------------------------------------


def _dimensions(name: str) -> int:
    return next(int(digit) for digit in name if digit.isdigit())


def _image(choices: Choices, spatial: int, channels: int, low: int = 3) -> list[int]:
    sizes = [choices.of((low, low + 1, low + 2)) for _ in range(spatial)]
    return [*([] if choices.flag() else [choices.of((2, 1))]), channels, *sizes]


@_makes("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv(choices: Choices, name: str) -> OperatorCall:
    spatial = choices.of((1, 2)) if name == "convolution" else _dimensions(name)
    transposed = "transpose" in name or (name == "convolution" and choices.flag())
    groups, i, o = choices.of((1, 2, 3)), choices.of((1, 2, 3)), choices.of((1, 2, 3))
    shape = _image(choices, spatial, groups * i)
    if name == "convolution" and len(shape) < spatial + 2:
        shape.insert(0, 2)
    taps = [choices.of((1, 2, 3)) for _ in range(spatial)]
    weight = _real(groups * i, o, *taps) if transposed else _real(groups * o, i, *taps)
    bias = _maybe(choices, _real(groups * o))
    stride, padding, one, none = (
        [choices.of((1, 2))] * spatial,
        [choices.whole(0, 1)] * spatial,
        [1] * spatial,
        [0] * spatial,
    )
    x = _of("real", shape)
    if name == "convolution":
        return _call(name, "default", x, weight, bias, stride, none, one, transposed, none, groups)
    if transposed:
        overload = "default" if spatial == 1 else "input"
        return _call(name, overload, x, weight, bias, stride, none, none, groups, one)
    if choices.flag() and len(shape) == spatial + 2:
        return _call(name, "padding", x, weight, bias, one, choices.of(("same", "valid")), one, groups)
    return _call(name, "default", x, weight, bias, stride, padding, one, groups)


@_makes("max_pool1d avg_pool1d max_pool2d avg_pool2d max_pool3d avg_pool3d max_pool2d_with_indices")
@_makes("max_pool1d_with_indices max_pool3d_with_indices")
def _pool(choices: Choices, name: str) -> OperatorCall:
    spatial = _dimensions(name)
    shape = _image(choices, spatial, choices.of((2, 3, 1)))
    window, stride = [choices.of((2, 1, 3))] * spatial, [choices.of((1, 2))] * spatial
    return _call(name, "default", _of("real", shape), window, stride)


@_makes(
    "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
)
def _adaptive(choices: Choices, name: str) -> OperatorCall:
    spatial = _dimensions(name)
    shape = _image(choices, spatial, choices.of((2, 3, 1)))
    return _call(name, "default", _of("real", shape), [choices.of((1, 2, 3)) for _ in range(spatial)])


@_makes("fractional_max_pool2d fractional_max_pool3d")
def _fractional(choices: Choices, name: str) -> OperatorCall:
    spatial, batch, channels = _dimensions(name), choices.of((1, 2)), choices.of((2, 3))
    shape = [batch, channels, *[5] * spatial]
    samples = _of("positive", [batch, channels, spatial])
    return _call(name, "default", _of("real", shape), [2] * spatial, [2] * spatial, samples)


@_makes("max_unpool2d max_unpool3d")
def _unpool(choices: Choices, name: str) -> OperatorCall:
    spatial, channels = _dimensions(name), choices.of((2, 3))
    shape = [choices.of((1, 2)), channels, *[2] * spatial]
    size = [4] * spatial
    indices = _of("index", shape, 4**spatial)
    more = [[2] * spatial, [0] * spatial] if spatial == 3 else []
    return _call(name, "default", _of("real", shape), indices, size, *more)


@_makes(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def _upsample(choices: Choices, name: str) -> OperatorCall:
    spatial = _dimensions(name)
    shape = [choices.of((2, 1)), choices.of((2, 3)), *(choices.of((2, 3)) for _ in range(spatial))]
    sizes = [choices.of((2, 4, 5)) for _ in range(spatial)]
    more = [] if "nearest" in name else [choices.flag()]
    return _call(name, "default", _of("real", shape), sizes, *more)


@_makes(
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)
def _border(choices: Choices, name: str) -> OperatorCall:
    spatial = _dimensions(name)
    shape = [choices.of((2, 1)), choices.of((2, 3)), *[3] * spatial]
    return _call(name, "default", _of("real", shape), [choices.whole(0, 2) for _ in range(2 * spatial)])


@_makes("im2col")
def _im2col(choices: Choices, name: str) -> OperatorCall:
    shape = [*([2] if choices.flag() else []), choices.of((2, 3)), choices.of((3, 4)), choices.of((3, 4))]
    window, stride = [choices.of((2, 1)), 2], [choices.of((1, 2)), 1]
    return _call(name, "default", _of("real", shape), window, [1, 1], [0, 0], stride)


@_makes("col2im")
def _col2im(choices: Choices, name: str) -> OperatorCall:
    channels, taps = choices.of((2, 3)), [2, choices.of((1, 2))]
    size = [choices.of((3, 4)), choices.of((3, 4))]
    count = (size[0] - taps[0] + 1) * (size[1] - taps[1] + 1)
    shape = [choices.of((2, 1)), channels * math.prod(taps), count]
    return _call(name, "default", _of("real", shape), size, taps, [1, 1], [0, 0], [1, 1])


@_makes("grid_sampler grid_sampler_2d grid_sampler_3d")
def _grid(choices: Choices, name: str) -> OperatorCall:
    spatial = 3 if "3d" in name else 2
    batch, channels = choices.of((2, 1)), choices.of((2, 3))
    sizes = [choices.of((2, 3)) for _ in range(spatial)]
    grid = [batch, *(choices.of((2, 3)) for _ in range(spatial)), spatial]
    mode = choices.of((0, 1))
    return _call(
        name, "default", _of("real", [batch, channels, *sizes]), _of("grid", grid), mode, 0, choices.flag()
    )


# -- reductions -----------------------------------------------------------------------------------


@_makes("mean sum amax amin prod logsumexp nansum all any count_nonzero")
def _reduction(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    kind = {"nansum": "missing", "all": "truth", "any": "truth", "count_nonzero": "rounded"}.get(name, "real")
    x, axes, keep = _of(kind, shape), _axes(choices, len(shape)), choices.flag()
    if name == "count_nonzero":
        return _call(name, "dim_IntList", x, axes)
    if name in ("all", "any", "prod"):
        overload = "dim_int" if name == "prod" else "dim"
        return _call(name, overload, x, axes[0], keep) if choices.flag() else _call(name, "default", x)
    if name in ("mean", "sum"):
        overload = "dim" if name == "mean" else "dim_IntList"
        return _call(name, overload, x, axes, keep) if choices.flag() else _call(name, "default", x)
    return _call(name, "default", x, axes, keep)


@_makes("var std var_mean std_mean")
def _variance(choices: Choices, name: str) -> OperatorCall:
    shape = [size + 1 for size in _shape(choices, 1, 4)]
    x, axes, keep = _of("real", shape), _axes(choices, len(shape)), choices.flag()
    overload = choices.of(("correction", "dim", "default"))
    if overload == "correction":
        return _call(name, overload, x, choices.of((axes, None)), correction=choices.of((0, 1)), keepdim=keep)
    return (
        _call(name, overload, x, axes, False, keep) if overload == "dim" else _call(name, overload, x, False)
    )


@_makes("linalg_vector_norm norm")
def _vector_norm(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    x, axes, keep, order = (
        _of("real", shape),
        _axes(choices, len(shape)),
        choices.flag(),
        choices.of((2, 1, 3)),
    )
    if name == "norm":
        return (
            _call(name, "ScalarOpt_dim", x, order, axes, keep)
            if choices.flag()
            else _call(name, "Scalar", x, order)
        )
    return _call(name, "default", x, order, choices.of((axes, None)), keep)


@_makes("max min argmax argmin")
def _extremum(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    x, axis, keep = _of("real", shape), _axis(choices, len(shape)), choices.flag()
    if name.startswith("arg"):
        return _call(name, "default", x, axis, keep) if choices.flag() else _call(name, "default", x)
    overload = choices.of(("dim", "default", "other"))
    if overload == "other":
        return _call(name, overload, x, _of("real", _narrower(choices, shape)))
    return _call(name, overload, x, axis, keep) if overload == "dim" else _call(name, overload, x)


@_makes("kthvalue median nanmedian mode")
def _statistic(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    x, axis, keep = _of("real", shape), _axis(choices, len(shape)), choices.flag()
    if name == "kthvalue":
        return _call(name, "default", x, choices.whole(1, shape[axis]), axis, keep)
    if name == "mode":
        return _call(name, "default", x, axis, keep)
    return _call(name, "dim", x, axis, keep) if choices.flag() else _call(name, "default", x)


@_makes("softmax log_softmax _softmax _log_softmax _safe_softmax")
def _softmax(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 4)
    x, axis = _of("real", shape), _axis(choices, len(shape))
    if name in ("_softmax", "_log_softmax"):
        return _call(name, "default", x, axis, False)
    return _call(name, "default" if name == "_safe_softmax" else "int", x, axis)


@_makes("cumsum cumprod logcumsumexp cummax cummin sort argsort topk")
def _ordered(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    x, axis = _of("real", shape), _axis(choices, len(shape))
    if name == "topk":
        flags = (choices.flag(), choices.flag())
        return _call(name, "default", x, choices.whole(1, shape[axis]), axis, *flags)
    if name == "sort" and choices.flag():
        return _call(name, "stable", x, stable=True, dim=axis, descending=choices.flag())
    if name in ("sort", "argsort"):
        return _call(name, "default", x, axis, choices.flag())
    return _call(name, "default", x, axis)


# -- norms and attention --------------------------------------------------------------------------


@_makes("layer_norm rms_norm native_layer_norm _fused_rms_norm")
def _layer_norm(choices: Choices, name: str) -> OperatorCall:
    leading, last = _shape(choices, 0, 2), [size + 1 for size in _shape(choices, 1, 2)]
    x, weight, bias = _of("real", [*leading, *last]), _of("real", last), _of("real", last)
    if "rms" in name:
        return _call(name, "default", x, last, _maybe(choices, weight), 1e-6)
    return _call(name, "default", x, last, _maybe(choices, weight), _maybe(choices, bias), 1e-5)


@_makes("batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit instance_norm group_norm")
def _channel_norm(choices: Choices, name: str) -> OperatorCall:
    groups = choices.of((1, 2, 3)) if name == "group_norm" else 1
    channels = groups * choices.of((2, 3, 1))
    shape = [2, channels, *(size + 1 for size in _shape(choices, 1, 2))]
    x = _of("real", shape)
    weight, bias = (_real(channels), _real(channels)) if choices.flag() else (None, None)
    if name == "group_norm":
        return _call(name, "default", x, groups, weight, bias)
    if name == "_native_batch_norm_legit":
        return _call(name, "no_stats", x, weight, bias, True, 0.1, 1e-5)
    mean, variance = _real(channels), _of("positive", [channels])
    if name == "instance_norm" and choices.flag():
        return _call(name, "default", x, weight, bias, None, None, True, 0.1, 1e-5, False)
    if name == "_native_batch_norm_legit_no_training":
        return _call(name, "default", x, weight, bias, mean, variance, 0.1, 1e-5)
    return _call(name, "default", x, weight, bias, mean, variance, False, 0.1, 1e-5, False)


@_makes("scaled_dot_product_attention")
def _attention(choices: Choices, name: str) -> OperatorCall:
    batch, heads, group = _shape(choices, 0, 1), choices.of((2, 1, 3)), choices.of((1, 2))
    length, others, key, value = (choices.of((2, 3, 4, 1)) for _ in range(4))
    causal = choices.flag()
    others = length if causal else others
    query = [*batch, heads * group, length, key]
    mask = None
    if not causal and choices.flag():
        shape = _narrower(choices, [*batch, heads * group])
        kind = choices.of(("real", "mask"))
        mask = _of(kind, [*shape, choices.of((1, length)), others])
    named: dict[str, Any] = {"enable_gqa": True} if group > 1 else {}
    if choices.flag():
        named["scale"] = 0.7
    operands = [
        _of("real", query),
        _of("real", [*batch, heads, others, key]),
        _of("real", [*batch, heads, others, value]),
    ]
    return _call(name, "default", *operands, mask, 0.0, causal, **named)


@_makes("_native_multi_head_attention")
def _multi_head(choices: Choices, name: str) -> OperatorCall:
    heads, size, length = choices.of((2, 1, 3)), choices.of((2, 3)), choices.of((3, 2))
    width = heads * size
    x = _of("real", [2, length, width])
    return _call(
        name, "default", x, x, x, width, heads, _real(3 * width, width), _real(3 * width),
        _real(width, width), _real(width), None, choices.flag(),
    )  # fmt: skip


@_makes("_transformer_encoder_layer_fwd")
def _encoder_layer(choices: Choices, name: str) -> OperatorCall:
    heads, size, length, hidden = (choices.of((2, 3)) for _ in range(4))
    width = heads * size
    vectors = [_real(width) for _ in range(4)]
    return _call(
        name, "default", _of("real", [2, length, width]), width, heads, _real(3 * width, width),
        _real(3 * width), _real(width, width), _real(width), choices.flag(), choices.flag(), 1e-5, *vectors,
        _real(hidden, width), _real(hidden), _real(width, hidden), _real(width),
    )  # fmt: skip


# -- recurrent layers and Fourier transforms ------------------------------------------------------

_GATES = {"lstm": 4, "gru": 3}


@_makes("lstm gru rnn_tanh rnn_relu")
def _recurrent(choices: Choices, name: str) -> OperatorCall:
    inputs, hidden, layers, length = (
        choices.of((2, 3)),
        choices.of((3, 2)),
        choices.of((1, 2)),
        choices.of((2, 3)),
    )
    bias, both, first = choices.flag(), choices.flag(), choices.flag()
    directions, rows = (2 if both else 1), _GATES.get(name, 1) * hidden
    weights: list[Values] = []
    for layer in range(layers):
        width = inputs if layer == 0 else directions * hidden
        for _ in range(directions):
            weights += [_real(rows, width), _real(rows, hidden)] + [_real(rows), _real(rows)] * bias
    x = _of("real", [2, length, inputs] if first else [length, 2, inputs])
    state = _of("real", [layers * directions, 2, hidden])
    states = [state, state] if name == "lstm" else state
    return _call(name, "input", x, states, weights, bias, layers, 0.0, False, both, first)


@_makes("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _cell(choices: Choices, name: str) -> OperatorCall:
    inputs, hidden = choices.of((2, 3)), choices.of((3, 2))
    rows = _GATES.get(name.partition("_")[0], 1) * hidden
    state = _of("real", [2, hidden])
    states = [state, state] if name == "lstm_cell" else state
    biases = [_real(rows), _real(rows)] if choices.flag() else []
    return _call(
        name, "default", _of("real", [2, inputs]), states, _real(rows, inputs), _real(rows, hidden), *biases
    )


@_makes("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft")
def _transform(choices: Choices, name: str) -> OperatorCall:
    shape = [size + 1 for size in _shape(choices, 1, 3)]
    kind = "real" if name in ("fft_rfft", "fft_ihfft") else "complex"
    norm = _maybe(choices, "ortho")
    return _call(name, "default", _of(kind, shape), choices.of((None, 3)), _axis(choices, len(shape)), norm)


@_makes(
    "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn "
    "fft_hfftn fft_ihfftn"
)
def _transforms(choices: Choices, name: str) -> OperatorCall:
    shape = [size + 1 for size in _shape(choices, 2, 3)]
    kind = "real" if "rfft" in name.replace("irfft", "") or "ihfft" in name else "complex"
    axes = _order(choices, len(shape))[:2]
    if name.endswith("n") and choices.flag():
        return _call(name, "default", _of(kind, shape))
    return _call(name, "default", _of(kind, shape), None, axes)


@_makes("_fft_c2c _fft_r2c _fft_c2r")
def _transform_core(choices: Choices, name: str) -> OperatorCall:
    shape = [size + 1 for size in _shape(choices, 1, 3)]
    axes = [axis % len(shape) for axis in _axes(choices, len(shape))]
    kind = "real" if name == "_fft_r2c" else "complex"
    last: Any = choices.flag() if name != "_fft_c2r" else shape[axes[-1]]
    if name == "_fft_c2r":
        last = 2 * (shape[axes[-1]] - 1)
    return _call(name, "default", _of(kind, shape), axes, 0, last)


# -- indexing and experts -------------------------------------------------------------------------


@_makes("embedding")
def _embedding(choices: Choices, name: str) -> OperatorCall:
    rows, width = choices.of(SIZES), choices.of(SIZES)
    return _call(name, "default", _real(rows, width), _of("index", _shape(choices, 0, 2), rows))


@_makes("embedding_bag _embedding_bag _embedding_bag_forward_only")
def _bag(choices: Choices, name: str) -> OperatorCall:
    rows, width, count = choices.of((4, 3, 2)), choices.of((3, 2)), choices.of((4, 3))
    indices, offsets = _of("index", [count], rows), _of("starts", [2], count)
    overload = "default"
    return _call(name, overload, _real(rows, width), indices, offsets, False, choices.of((0, 1, 2)))


@_makes("index _unsafe_index index_put")
def _index(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    if name == "index_put":
        return _index_put(choices, name, shape)
    picked = _shape(choices, 1, 2)
    given: list[Values | None] = []
    for size in shape:
        given.append(_of("index", _narrower(choices, picked) or [1], size) if choices.flag() else None)
    if not any(given):
        given[0] = _of("index", picked, shape[0])
    if name == "index" and choices.flag():
        given = [None] * choices.whole(0, len(shape) - 1)
        given.append(_of("mask", [shape[len(given)]]))
    while given[-1] is None:
        given.pop()
    return _call(name, "Tensor", _of("real", shape), given)


def _index_put(choices: Choices, name: str, shape: list[int]) -> OperatorCall:
    axis, count, adding = choices.whole(0, len(shape) - 1), choices.of((2, 3)), choices.flag()
    distinct = not adding and count <= shape[axis] and choices.flag()
    indices = _of("order" if distinct else "index", [count], shape[axis])
    values = _of("real", _narrower(choices, [*shape[:axis], count, *shape[axis + 1 :]]))
    return _call(name, "default", _of("real", shape), [None] * axis + [indices], values, adding)


@_makes("index_select gather take_along_dim")
def _picked(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    x, size = _of("real", shape), shape[axis]
    if name == "index_select":
        return _call(name, "default", x, axis, _of("index", [choices.of((2, 3, 1))], size))
    picked = list(shape)
    if choices.flag():
        picked = [1 if name != "gather" and choices.flag() else choices.whole(1, item) for item in shape]
        picked = [
            item if name == "gather" or item == 1 else whole
            for item, whole in zip(picked, shape, strict=True)
        ]
    picked[axis] = choices.of((2, 3, 1))
    indices = _of("index", picked, size)
    return (
        _call(name, "default", x, indices, axis)
        if name == "take_along_dim"
        else _call(name, "default", x, axis, indices)
    )


@_makes("index_add index_copy index_reduce")
def _index_add(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    x, size = _of("real", shape), shape[axis]
    count = choices.whole(1, size) if name == "index_copy" else choices.of((3, 2, 4))
    source = list(shape)
    source[axis] = count
    indices = _of("order" if name == "index_copy" else "index", [count], size)
    more = [choices.of(("amax", "prod", "mean"))] if name == "index_reduce" else []
    return _call(name, "default", x, axis, indices, _of("real", source), *more)


@_makes("scatter scatter_add scatter_reduce")
def _scatter(choices: Choices, name: str) -> OperatorCall:
    shape = _shape(choices, 1, 3)
    axis = _axis(choices, len(shape))
    source = list(shape)
    source[axis] = choices.of((3, 2, 1, 4)) if name != "scatter" else choices.whole(1, shape[axis])
    if choices.flag():
        other = choices.whole(0, len(shape) - 1)
        source[other] = choices.whole(1, source[other])
    distinct = name == "scatter" and len(shape) == 1
    indices = _of("order" if distinct else "index", source, shape[axis])
    x, values = _of("real", shape), _of("real", source)
    if name == "scatter":
        return (
            _call(name, "src", x, axis, indices, values)
            if distinct
            else _call(name, "value", x, axis, indices, 2.0)
        )
    if name == "scatter_add":
        return _call(name, "default", x, axis, indices, values)
    return _call(name, "two", x, axis, indices, values, choices.of(("sum", "amax", "mean")))


@_makes("bucketize searchsorted")
def _intervals(choices: Choices, name: str) -> OperatorCall:
    count = choices.of((3, 2, 4))
    if name == "bucketize":
        return _call(name, "Tensor", _of("real", _shape(choices, 0, 3)), _of("sorted", [count]))
    leading = _shape(choices, 0, 2)
    return _call(name, "Tensor", _of("sorted", [*leading, count]), _of("real", [*leading, choices.of(SIZES)]))


@_makes("one_hot histc bincount")
def _counted(choices: Choices, name: str) -> OperatorCall:
    if name == "one_hot":
        classes = choices.of((3, 2, 4))
        return _call(name, "default", _of("index", _shape(choices, 0, 2), classes), classes)
    if name == "histc":
        return _call(name, "default", _of("real", _shape(choices, 1, 2)), choices.of((4, 2)), -2, 2)
    count = choices.of((4, 3))
    weights = [_real(count)] if choices.flag() else []
    return _call(name, "default", _of("index", [count], 3), *weights, **({} if weights else {"minlength": 3}))


@_makes("transformers::grouped_mm_fallback")
def _grouped(choices: Choices, name: str) -> OperatorCall:
    import transformers.integrations.moe  # noqa: F401 - registers the operator

    tokens, groups, i, o = (
        choices.of((6, 4)),
        choices.of((3, 2)),
        choices.of((4, 2, 3)),
        choices.of((3, 2, 5)),
    )
    return _call(name, "default", _real(tokens, i), _real(groups, i, o), _of("ends", [groups], tokens))


# -- what reads no values -------------------------------------------------------------------------


@_makes("zeros_like ones_like full_like fill new_zeros new_ones new_full zeros ones full scalar_tensor")
def _create(choices: Choices, name: str) -> OperatorCall:
    x, sizes = _of("real", _shape(choices, 0, 3)), _shape(choices, 0, 3)
    if name == "scalar_tensor":
        return _call(name, "default", 2.0)
    if name == "fill":
        return _call(name, "Scalar", x, 2.0)
    operands: list[Any] = [x] if name.endswith("_like") or name.startswith("new_") else []
    operands += [sizes] if not name.endswith("_like") else []
    operands += [2.0] if "full" in name else []
    return _call(name, "default", *operands)
