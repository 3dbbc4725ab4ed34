"""A wrong rule is found by random networks and by random calls of its operator alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fxfusion.rules import RULES, Context, Typed
from fxfusion.testing import Network, OperatorCall, check_network, networks, operator_calls

SEARCH = settings(
    max_examples=600,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def _linear_without_bias(context: Context, x: Typed, weight: Typed, bias: Typed | None = None) -> Typed:
    return context.einsum("... i, o i -> ... o", x, weight)


def _view_that_invents(context: Context, x: Typed, *_: Any) -> Typed:
    return Typed(tuple(context.leaf(size) for size in context.shapes[0]))


def _attention_without_mix(
    context: Context, query: Typed, key: Typed, value: Typed, *_: Any, **__: Any
) -> Typed:
    return Typed((*query.axes[:-1], value.axes[-1]))


PLANTED: dict[str, Any] = {
    "linear": _linear_without_bias,
    "view": _view_that_invents,
    "scaled_dot_product_attention": _attention_without_mix,
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_networks_find_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    @SEARCH
    @given(networks())
    def run(network: Network) -> None:
        assert check_network(network).error <= 1e-9

    monkeypatch.setitem(RULES, name, PLANTED[name])
    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize("name", list(PLANTED))
def test_calls_find_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    @SEARCH
    @given(operator_calls(name))
    def run(call: OperatorCall) -> None:
        assert call.check().ok

    monkeypatch.setitem(RULES, name, PLANTED[name])
    with pytest.raises(AssertionError):
        run()
