"""The examples on testing one's own rules run, and say what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fxfusion.rules import RULES

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an example add rules to a copy of the table's content."""
    for name in ("mylib::soft_gate", "mylib::ranked_mean"):
        monkeypatch.setitem(RULES, name, RULES["add"])
        monkeypatch.delitem(RULES, name)


def test_an_operator_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "add_an_operator.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "without a rule: 0 free spaces" in printed
    assert "it has no rule" in printed
    assert "with the rule: 1 free spaces" in printed


def test_a_wrong_rule_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "property_test_your_rule.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "the wrong rule is found" in printed
    assert "Values('real', tuple([2]))" in printed.replace("(2,)", "tuple([2])")
    assert "the right rule passes" in printed
