"""Random calls of every operator that has a rule: what the rule claims is true."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fxfusion.errors import OptionError
from fxfusion.rules import RULES, operator_name
from fxfusion.testing import OperatorCall, operator_calls
from fxfusion.testing.random_calls import EXEMPT, MAKERS

FEW, MANY = 4, 500


def check_many(name: str, count: int, derandomize: bool) -> None:
    """Check drawn calls of an operator."""
    phases = [Phase.generate] if derandomize else [Phase.generate, Phase.shrink]

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(operator_calls(name))
    def run(call: OperatorCall) -> None:
        assert operator_name(call.operator) == name
        report = call.check()
        assert report.ok, report.false_claims

    run()


def test_every_rule_has_calls() -> None:
    assert set(RULES) - set(EXEMPT) - set(MAKERS) == set()
    assert not set(MAKERS) & set(EXEMPT)
    assert set(MAKERS) | set(EXEMPT) <= set(RULES)
    assert all(EXEMPT.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_calls(name: str) -> None:
    check_many(name, FEW, derandomize=True)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_many_calls(name: str) -> None:
    check_many(name, MANY, derandomize=False)


@pytest.mark.parametrize("name", ["empty_like", "no such operator"])
def test_operator_without_calls_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        operator_calls(name)
