"""Every rule against its operator: what it claims is true, and what it misses is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxfusion.axes import Constant
from fxfusion.rules import RULES, Context, Typed
from fxfusion.testing import Free, RuleReport, check_rule
from tests.rules.examples import EXAMPLES, INDICES, Example, call, positive, real, truth

aten = torch.ops.aten

UNINITIALISED = "the values of its output are not defined"
EXEMPT = {
    "empty": UNINITIALISED,
    "empty_like": UNINITIALISED,
    "new_empty": UNINITIALISED,
    "empty_strided": UNINITIALISED,
    "new_empty_strided": UNINITIALISED,
    "empty_permuted": UNINITIALISED,
    "cudnn_grid_sampler": "it runs on CUDA only; grid_sampler has the same rule",
    "_grouped_mm": "it refuses float64; transformers::grouped_mm_fallback has the same rule",
}

# What rules miss, by "operator/number of the example". All of it is a loss of coverage, none a falsehood.
WINDOWS = (
    "windows that do not overlap are sets, and a set of windows may be permuted; spatial axes stay fixed"
)
REGULAR = "every position is treated alike (resampling, stride without overlap); spatial axes stay fixed"
WRITTEN = "elements that constant indices write to one place may swap, and old values may not be read at all"
INDEXED = "units that constant indices pick equally often may swap; indexed axes stay fixed"
MASKED = "how many units a mask picks depends on data: every axis stays fixed"
FREQUENCIES = "swapping n and -n swaps frequencies k and -k; transformed axes stay fixed"
MIRRORED = "positions that padding repeats equally often may swap; spatial axes stay fixed"
MISSED: dict[str, tuple[str, set[str]]] = {
    "_native_multi_head_attention/2": ("a padding mask orders keys only; queries stay fixed", {"query[1]"}),
    "embedding_bag/0": (INDEXED, {"weight[0] as 2*(2)*1"}),
    "_embedding_bag_forward_only/0": (INDEXED, {"weight[0] units 0 3"}),
    "slice_scatter/2": (
        "a stride that does not divide the axis picks two sets",
        {"self[1] as 1*(3)*2 = src[1]"},
    ),
    "reflection_pad2d/0": (MIRRORED, {"self[2] units 0 2", "self[3] units 0 3"}),
    "replication_pad2d/0": (MIRRORED, {"self[2] units 0 1", "self[3] units 1 2"}),
    "reflection_pad3d/0": (
        MIRRORED,
        {"self[2] units 0 2", "self[3] units 0 1 3", "self[4] units 0 4", "self[4] units 1 2 3"},
    ),
    "replication_pad3d/0": (MIRRORED, {"self[2] units 1 2", "self[3] units 0 1 2", "self[4] units 1 2 3"}),
    "upsample_nearest3d/0": (REGULAR, {"self[3] units 0 1", "self[4]"}),
    "upsample_trilinear3d/0": (REGULAR, {"self[2] units 0 1", "self[3] units 0 2", "self[4] units 0 1"}),
    "_upsample_nearest_exact1d/0": (REGULAR, {"self[2] as 1*(2)*2"}),
    "_upsample_nearest_exact3d/0": (REGULAR, {"self[3] units 0 2", "self[4]"}),
    **{
        f"{name}/0": (FREQUENCIES, {f"self[{axis}] units 1 2"})
        for names, axis in {
            "fft_fft fft_ifft _fft_c2c": 0,
            "fft_fft2 fft_ifft2 fft_rfft2 fft_ihfft2": 1,
        }.items()
        for name in names.split()
    },
    "fft_fftn/1": (FREQUENCIES, {"self[1] units 1 2"}),
    "view/4": ("a view as a wider dtype packs units of the last axis", {"self[0]", "self[1] as 1*(3)*2"}),
    "view/2": (
        "the common refinement of 6*4 and 4*6 is 2*3 and 2*2 across axes: a clash fixes both",
        {"self[0] as 1*(2)*3", "self[1] as 2*(2)*1"},
    ),
    "slice/3": (
        "a stride that does not divide the axis picks two sets",
        {"self[1] units 0 2 4 6", "self[1] units 1 3 5"},
    ),
    "pad/1": ("reflection repeats some units", {"self[2] units 0 4", "self[2] units 1 2 3"}),
    "roll/0": ("a rotation could be a concatenation of two parts", {"self[1] units 0 1 2 3 4"}),
    "roll/1": (
        "a rotation could be a concatenation of two parts",
        {"self[1] units 0 1 2", "self[1] units 3 4"},
    ),
    "flip/0": ("no type says that units stand in reverse order", {"self[1] units 0 1 2 3 4"}),
    "conv2d/5": (REGULAR, {"input[2] units 0 2 4", "input[2] units 1 3", "input[3] as 1*(3)*2"}),
    "conv2d/6": (
        WINDOWS,
        {
            "input[2] as 1*(2)*3",
            "input[2] as 2*(3)*1 = weight[2]",
            "input[3] as 1*(2)*4",
            "input[3] as 1*(4)*2",
            "input[3] as 2*(2)*2",
            "input[3] as 4*(2)*1 = weight[3]",
        },
    ),
    "conv2d/7": (REGULAR, {"input[2] units 0 2", "input[3] units 0 2"}),
    "conv_transpose2d/2": (REGULAR, {"input[2] units 0 2", "input[3] units 0 2"}),
    "conv_transpose2d/1": (WINDOWS, {"input[2]", "weight[2]"}),
    "max_pool1d/0": (WINDOWS, {"self[2] units 0 1", "self[2] units 2 3", "self[2] units 4 5"}),
    "adaptive_avg_pool1d/0": (WINDOWS, {"self[2] units 0 1", "self[2] units 5 6"}),
    "adaptive_avg_pool2d/0": (
        WINDOWS,
        {"self[2] units 0 1", "self[2] units 3 4", "self[3] as 1*(2)*3"},
    ),
    "adaptive_avg_pool2d/1": ("global pooling is a mean over positions", {"self[2]", "self[3]"}),
    "_adaptive_avg_pool2d/0": (
        WINDOWS,
        {"self[2] units 0 1", "self[2] units 3 4", "self[3] as 1*(2)*3"},
    ),
    "adaptive_avg_pool3d/0": (
        WINDOWS,
        {"self[2] as 1*(2)*2", "self[2] as 2*(2)*1", "self[4] as 1*(2)*3"},
    ),
    "_adaptive_avg_pool3d/0": (
        WINDOWS,
        {"self[2] as 1*(2)*2", "self[2] as 2*(2)*1", "self[4] as 1*(2)*3"},
    ),
    "upsample_nearest1d/0": (REGULAR, {"self[2]"}),
    "upsample_nearest2d/0": (REGULAR, {"self[2]", "self[3] units 0 2", "self[3] units 1 3 4"}),
    "_upsample_nearest_exact2d/0": (REGULAR, {"self[2]", "self[3] units 0 2 4", "self[3] units 1 3"}),
    "index/3": (MASKED, {"self[0] units 0 2", "self[1]"}),
    "index/4": (MASKED, {"self[0]", "self[1]"}),
    "index/5": (MASKED, {"self[2]"}),
    "gather/2": (INDEXED, {"self[0] units 0 1", "self[1] units 2 3"}),
    "take_along_dim/1": (INDEXED, {"self[0]", "self[1] units 2 3"}),
    "bincount/1": (WRITTEN, {"weights[0] units 0 3 5", "weights[0] units 2 4"}),
    "transformers::grouped_mm_fallback/0": (
        "tokens of one group may swap; tokens stay fixed",
        {"input[0] units 1 2", "input[0] units 3 4 5"},
    ),
    "index_add/0": (WRITTEN, {"source[0] units 0 3 5", "source[0] units 2 4"}),
    "index_add/1": (WRITTEN, {"source[1] units 0 3 5", "source[1] units 2 4"}),
    "index_copy/0": (WRITTEN, {"self[0] as 1*(2)*2 = source[0]"}),
    "index_reduce/0": (WRITTEN, {"source[0] units 0 3 5", "source[0] units 2 4"}),
    "scatter/0": (WRITTEN, {"self[0]", "self[1]", "src[0] units 0 1 2", "src[1]"}),
    "scatter/1": (WRITTEN, {"self[0]"}),
    "scatter/2": (WRITTEN, {"self[0]", "self[1] as 2*(2)*1"}),
    "index_put/0": (
        WRITTEN,
        {"self[0]", "self[1]", "values[0] units 0 2 3", "values[0] units 1 4 5", "values[1]"},
    ),
    "index_put/1": (WRITTEN, {"values[0] units 0 3 5", "values[0] units 2 4"}),
    "index_put/3": (WRITTEN, {"self[0]", "values[0] units 0 1 2"}),
    "index_select/0": (INDEXED, {"self[1] units 0 1", "self[1] units 2 3"}),
}

CASES = [
    pytest.param(f"{name}/{number}", example, id=f"{name}/{number}")
    for name, examples in EXAMPLES.items()
    for number, example in enumerate(examples)
]


def check(example: Example, seed: int = 0) -> RuleReport:
    """Hold the rule of an example's operator against the operator."""
    return check_rule(example.operator, example.args, example.kwargs, seed)


def test_every_rule_has_an_example() -> None:
    assert set(RULES) == set(EXAMPLES) | set(EXEMPT)
    assert not set(EXAMPLES) & set(EXEMPT)
    for name, examples in EXAMPLES.items():
        for example in examples:
            full = name if "::" in name else f"aten::{name}"
            assert example.operator._schema.name == full  # type: ignore[attr-defined]
    for name, reason in EXEMPT.items():
        assert hasattr(aten, name), reason


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize(("name", "example"), CASES)
def test_no_false_claims_and_only_known_misses(name: str, example: Example) -> None:
    report = check(example)
    assert not report.false_claims
    assert set(report.missed) == MISSED.get(name, ("", set()))[1]


def test_tables_name_examples() -> None:
    assert set(MISSED) <= {str(case.values[0]) for case in CASES}


# -- drawn shapes ---------------------------------------------------------------------------------

SIZE = st.integers(1, 4)
DRAWN = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)


def sound(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    report = check_rule(operator, args, kwargs)
    assert report.ok, report


@DRAWN
@given(st.lists(SIZE, max_size=2), SIZE, SIZE, st.booleans())
def test_linear_of_any_shape(leading: list[int], inputs: int, outputs: int, biased: bool) -> None:
    bias = real(outputs) if biased else None
    sound(aten.linear.default, real(*leading, inputs), real(outputs, inputs), bias)


@DRAWN
@given(st.tuples(SIZE, SIZE), st.sampled_from(["", "left", "right", "both"]), SIZE, SIZE, SIZE)
def test_matmul_of_any_shape(batch: tuple[int, int], single: str, i: int, k: int, j: int) -> None:
    left = [1 if single in ("left", "both") else batch[0], batch[1]]
    right = [batch[0], 1 if single in ("right", "both") else batch[1]]
    sound(aten.matmul.default, real(*left, i, k), real(*right, k, j))


@DRAWN
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))
def test_convolution_with_any_groups(groups: int, i: int, o: int, taps: int, stride: int) -> None:
    x, weight, bias = real(2, groups * i, 5), real(groups * o, i, taps), real(groups * o)
    sound(aten.conv1d.default, x, weight, bias, [stride], [taps // 2], [1], groups)


@DRAWN
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
def test_transposed_convolution_with_any_groups(groups: int, i: int, o: int, taps: int) -> None:
    x, weight, bias = real(2, groups * i, 4), real(groups * i, o, taps), real(groups * o)
    sound(aten.conv_transpose1d.default, x, weight, bias, [1], [0], [0], groups)


@DRAWN
@given(st.lists(SIZE, min_size=1, max_size=3), st.integers(1, 3), st.booleans(), st.booleans())
def test_layer_norm_of_any_shape(shape: list[int], count: int, scaled: bool, shifted: bool) -> None:
    last = [size + 1 for size in shape[-count:]]
    x = real(*shape[:-count], *last)
    weight, bias = (real(*last) if given else None for given in (scaled, shifted))
    sound(aten.layer_norm.default, x, last, weight, bias)


@DRAWN
@given(st.integers(1, 3), st.integers(2, 3), st.integers(1, 3), st.booleans())
def test_group_norm_of_any_shape(groups: int, inner: int, positions: int, scaled: bool) -> None:
    weight = real(groups * inner) if scaled else None
    sound(aten.group_norm.default, real(2, groups * inner, positions), groups, weight)


@DRAWN
@given(st.integers(1, 4), st.lists(SIZE, max_size=2), st.booleans())
def test_batch_norm_of_any_shape(channels: int, positions: list[int], scaled: bool) -> None:
    weight, bias = (real(channels) if scaled else None for _ in range(2))
    x = real(3, channels, *positions)
    sound(
        aten.batch_norm.default, x, weight, bias, real(channels), positive(channels), False, 0.1, 1e-5, False
    )


@DRAWN
@given(st.integers(1, 2), st.integers(1, 3), st.sampled_from(["", "row", "full", "heads", "float"]))
def test_attention_with_any_heads_and_mask(heads: int, group: int, mask: str) -> None:
    query, key, value = real(2, heads * group, 3, 4), real(2, heads, 5, 4), real(2, heads, 5, 6)
    shape = {"row": (1, 5), "full": (3, 5), "heads": (2, heads * group, 3, 5)}.get(mask)
    attended = None if shape is None else truth(*shape) | (torch.arange(5) == 0)
    if mask == "float":
        attended = real(1, 1, 3, 5)
    sound(aten.scaled_dot_product_attention.default, query, key, value, attended, enable_gqa=group > 1)


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw two shapes of one number of elements, factors grouped in different ways."""
    primes = draw(st.lists(st.sampled_from([2, 3, 2]), min_size=1, max_size=4))

    def grouped() -> list[int]:
        sizes, current = [], 1
        for prime in primes:
            current *= prime
            if draw(st.booleans()):
                sizes.append(current)
                current = 1
        return [*sizes, current]

    return grouped(), grouped()


@DRAWN
@given(views())
def test_any_view(shapes: tuple[list[int], list[int]]) -> None:
    sound(aten.view.default, real(*shapes[0]), shapes[1])


@DRAWN
@given(st.lists(SIZE, min_size=1, max_size=3), st.integers(-2, 1), SIZE)
def test_any_concatenation(sizes: list[int], axis: int, other: int) -> None:
    shapes = [[size, other] if axis % 2 == 0 else [other, size] for size in sizes]
    sound(aten.cat.default, [real(*shape) for shape in shapes], axis)


@DRAWN
@given(st.lists(SIZE, min_size=1, max_size=3), st.integers(-2, 1))
def test_any_split(sizes: list[int], axis: int) -> None:
    shape = [sum(sizes), 3] if axis % 2 == 0 else [3, sum(sizes)]
    sound(aten.split_with_sizes.default, real(*shape), sizes, axis)


@DRAWN
@given(st.integers(2, 7), st.data())
def test_any_slice_and_selection(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(-size, size - 1))
    stop = data.draw(st.integers(start % size + 1, size))
    sound(aten.slice.Tensor, real(3, size), 1, start, stop, data.draw(st.integers(1, 3)))
    sound(aten.select.int, real(size, 3), 0, start)


@DRAWN
@given(st.lists(st.integers(2, 4), min_size=2, max_size=3), st.data())
def test_any_reduction_and_softmax(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = real(*shape)
    sound(aten.softmax.int, x, axis)
    sound(aten.amax.default, x, [axis], data.draw(st.booleans()))
    sound(aten.var.correction, x, [axis], correction=0, keepdim=data.draw(st.booleans()))
    sound(aten.cumsum.default, x, axis)


@DRAWN
@given(st.lists(st.tuples(st.integers(2, 4), st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_any_broadcast(axes: list[tuple[int, bool, bool]]) -> None:
    left = [1 if single else size for size, single, _ in axes]
    right = [1 if single else size for size, _, single in axes]
    sound(aten.mul.Tensor, real(*left), real(*right[1:]))
    sound(aten.where.self, Free(truth(*left)), real(*right), real(1))


@DRAWN
@given(st.integers(0, 2))
def test_any_indexed_axis(axis: int) -> None:
    x = real(4, 5, 6)
    sound(aten.index.Tensor, x, [None] * axis + [INDICES])
    sound(aten.index_select.default, x, axis, INDICES.flatten())
    sound(aten.gather.default, x, axis, torch.stack([INDICES % 3, INDICES.flip(1), INDICES]))


# -- planted bugs ---------------------------------------------------------------------------------


def _keep(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    return Typed(x.axes)


def _constant_along_last(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    return Typed((*x.axes[:-1], Constant(x.shape[-1])))


def _first_operand(context: Context, x: Typed, *_: Any, **__: Any) -> Typed:
    return Typed(tuple(context.broadcast(x, Typed((Constant(1),) * len(context.shapes[0]))).axes))


def _linear_without_bias(context: Context, x: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    return context.einsum("... i, o i -> ... o", x, weight)


def _linear_of_separate_inputs(context: Context, x: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    return context.einsum("... i, o j -> ... o", x, weight)


def _conv_without_groups(
    context: Context, x: Typed, weight: Typed, bias: Typed | None = None, *_: Any
) -> Typed:
    context.fix(*weight.axes[2:])
    context.fix(*x.axes[2:])
    channels = weight.axes[0] if bias is None else context.unify(weight.axes[0], bias.axes[0])
    return Typed((x.axes[0], channels, *context.fixed_like(context.shapes[0][2:])))


def _layer_norm_without_weight(context: Context, x: Typed, shape: Sequence[int], *_: Any) -> Typed:
    context.mix(x.axes[: -len(shape)], x.axes[-len(shape) :])
    return Typed(x.axes)


def _norm_without_mix(context: Context, x: Typed, groups: int, weight: Typed, bias: Typed, *_: Any) -> Typed:
    channels = context.unify(context.unify(x.axes[1], weight.axes[0]), bias.axes[0])
    return Typed((x.axes[0], channels, *x.axes[2:]))


def _softmax_without_mix(context: Context, x: Typed, dim: int, *_: Any) -> Typed:
    return Typed(x.axes)


def _reduction_that_keeps(context: Context, x: Typed, *_: Any) -> Typed:
    return Typed((*x.axes[:-2], x.axes[-1]))


def _attention_in_place(
    context: Context, query: Typed, key: Typed, value: Typed, *_: Any, **__: Any
) -> Typed:
    return context.einsum("... l d, ... s d, ... s e -> ... l e", query, key, value)


def _view_that_invents(context: Context, x: Typed, *_: Any) -> Typed:
    return Typed(tuple(context.leaf(size) for size in context.shapes[0]))


def _cat_in_reverse(context: Context, tensors: Sequence[Typed], dim: int = 0) -> Typed:
    return Typed((context.concat([item.axes[0] for item in reversed(tensors)]), tensors[0].axes[1]))


def _embedding_with_free_rows(context: Context, weight: Typed, indices: Typed, *_: Any) -> Typed:
    return Typed((*indices.axes, weight.axes[1]))


PLANTED: list[tuple[str, Any, Example]] = [
    ("cumsum", _keep, EXAMPLES["cumsum"][0]),
    ("sort", lambda *args, **_: [_keep(*args)] * 2, EXAMPLES["sort"][0]),
    ("sigmoid", _constant_along_last, EXAMPLES["sigmoid"][0]),
    ("mul", _first_operand, call(aten.mul.Tensor, real(3, 5), real(5))),
    ("linear", _linear_without_bias, EXAMPLES["linear"][0]),
    ("linear", _linear_of_separate_inputs, EXAMPLES["linear"][0]),
    ("conv2d", _conv_without_groups, EXAMPLES["conv2d"][1]),
    ("layer_norm", _layer_norm_without_weight, EXAMPLES["layer_norm"][0]),
    ("group_norm", _norm_without_mix, EXAMPLES["group_norm"][0]),
    ("softmax", _softmax_without_mix, call(aten.softmax.int, real(3, 5), 0)),
    ("sum", _reduction_that_keeps, call(aten.sum.dim_IntList, real(3, 5), [1])),
    ("amax", _reduction_that_keeps, call(aten.amax.default, real(4, 4), [1])),
    ("scaled_dot_product_attention", _attention_in_place, EXAMPLES["scaled_dot_product_attention"][3]),
    ("view", _view_that_invents, EXAMPLES["view"][0]),
    ("transpose", _keep, call(aten.transpose.int, real(4, 4), 0, 1)),
    ("cat", _cat_in_reverse, call(aten.cat.default, [real(3, 5), real(2, 5)])),
    ("embedding", _embedding_with_free_rows, EXAMPLES["embedding"][0]),
]


@pytest.mark.parametrize(
    ("name", "wrong", "example"),
    PLANTED,
    ids=[f"{name}{index}" for index, (name, _, _) in enumerate(PLANTED)],
)
def test_planted_bug_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, example: Example
) -> None:
    monkeypatch.setitem(RULES, name, wrong)
    assert check(example).false_claims


def test_planted_loss_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def timid(context: Context, x: Typed, *_: Any) -> Typed:
        context.fix(x.axes[-1])
        return Typed(x.axes)

    def over_merging(context: Context, x: Typed, other: Typed) -> Typed:
        return Typed(context.broadcast(x, other).axes)

    monkeypatch.setitem(RULES, "relu", timid)
    monkeypatch.setitem(RULES, "type_as", over_merging)
    assert check_rule(aten.relu.default, (real(3, 5),)).missed == ("self[1]",)
    report = check_rule(aten.type_as.default, (real(3, 5), real(3, 5)))
    assert report.ok
    assert report.missed == ("other[0]", "other[1]", "self[0]", "self[1]")


def test_operator_without_rule_is_sound_and_all_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "erfinv")
    report = check_rule(aten.erfinv.default, (positive(3, 5),))
    assert report.ok
    assert report.missed == ("self[0]", "self[1]")


@pytest.mark.parametrize(
    "name", ["relu", "layer_norm", "group_norm", "glu", "addmm", "softmax", "instance_norm", "prelu"]
)
def test_decomposition_is_as_sound_and_complete_as_the_rule(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delitem(RULES, name)
    for example in EXAMPLES[name]:
        report = check(example)
        assert report.ok
        assert not report.missed
