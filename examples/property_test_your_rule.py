"""Test a rule of one's own on random calls, and a model of one's own as a whole.

    python examples/property_test_your_rule.py

hypothesis draws shapes; ``check`` permutes what the rule claims to be free, on arguments that are made by
views, slices and repetition, and compares with the operator in float64. A wrong rule is found with the
smallest call that shows it.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxfusion.axes import Constant
from fxfusion.rules import RULES, Context, Typed, rule
from fxfusion.testing import OperatorCall, Values, check_model, operator_calls

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)
SIZE = st.integers(1, 4)


@torch.library.custom_op("mylib::ranked_mean", mutates_args=())
def ranked_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the last axis, units weighted by their position."""
    return (x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)).mean(-1, keepdim=True)


@ranked_mean.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1))


def wrong(context: Context, x: Typed) -> Typed:
    """Treat the last axis as a set, which it is not: positions have a meaning."""
    context.mix(x.axes[:-1], x.axes[-1:])
    return Typed((*x.axes[:-1], Constant(1)))


def right(context: Context, x: Typed) -> Typed:
    """Fix the last axis first."""
    context.fix(x.axes[-1])
    return wrong(context, x)


calls = st.lists(SIZE, min_size=1, max_size=3).map(
    lambda shape: OperatorCall("mylib::ranked_mean.default", (Values("real", tuple(shape)),))
)


@QUICK
@given(calls)
def test_my_rule(call: OperatorCall) -> None:
    """What the rule lets pass is a symmetry of the operator, whatever the shape."""
    report = call.check()
    assert report.ok, report.false_claims


@QUICK
@given(operator_calls("softmax"))
def test_a_rule_that_comes_with_fxfusion(call: OperatorCall) -> None:
    """Calls of every operator that fxfusion knows can be drawn by name."""
    report = call.check()
    assert report.ok, report.false_claims


def test_my_model() -> None:
    """A random symmetric twin of the model computes the same, and is not the model itself."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Softmax(-1), nn.LayerNorm(8), nn.Linear(8, 2))
    assert check_model(model, (torch.randn(4, 3),)).ok


def main() -> None:
    """Find the wrong rule, then test the right one."""
    rule("mylib::ranked_mean")(wrong)
    try:
        test_my_rule()
    except AssertionError as error:
        print(f"the wrong rule is found: {error}")
        print("\n".join(note for note in getattr(error, "__notes__", ()) if "ranked_mean" in note))
    RULES["mylib::ranked_mean"] = right
    test_my_rule()
    test_a_rule_that_comes_with_fxfusion()
    test_my_model()
    print("the right rule passes, and so does the model")


if __name__ == "__main__":
    main()
