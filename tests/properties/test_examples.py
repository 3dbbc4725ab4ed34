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


def test_solvers_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["solvers.py", "--units", "24"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "solvers.py"), run_name="__main__")
    assert ended.value.code == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "assignment, ours" in line]
    assert len(rows) == 3
    assert all(row[5].split()[0] == "0" for row in rows)  # as good as SciPy's


def test_passes_run_in_a_pipeline_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "compile_and_export.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("agrees: True") == 3


@pytest.mark.nightly
def test_a_large_checkpoint_but_tiny(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for command in (["make", "--size", "tiny"], ["fuse"], ["check"]):
        monkeypatch.setattr("sys.argv", ["large.py", *command, str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / "large.py"), run_name="__main__")
        assert not ended.value.code
    said = capsys.readouterr().out
    assert "of the rate of matrix products" in said
    assert "furthest from the target" in said


@pytest.mark.nightly
def test_a_fused_program_runs_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "deploy.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "images:" in line]
    assert len(lines) == 4
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)


def test_a_fused_network_is_fine_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fine_tune.py", "--parent-steps", "60", "--steps", "20"])
    runpy.run_path(str(EXAMPLES / "fine_tune.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for row in ("parent 0", "ensemble", "fused, tuned on labels", "fused, tuned on the parents' logits"):
        assert row in printed


def test_trainer_takes_a_fused_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    monkeypatch.setattr("sys.argv", ["fine_tune_with_trainer.py", "--parent-steps", "10", "--steps", "5"])
    runpy.run_path(str(EXAMPLES / "fine_tune_with_trainer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "fused, tuned on labels" in printed
    assert "fused, distilled" in printed


def test_the_idea_fits_in_one_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len((EXAMPLES / "from_scratch.py").read_text().splitlines()) <= 300
    monkeypatch.setattr("sys.argv", ["from_scratch.py", "--steps", "60"])
    runpy.run_path(str(EXAMPLES / "from_scratch.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    spaces = [line for line in lines if line.startswith("free space of 32 units")]
    assert len(spaces) == 3  # the stream, and the hidden channels of two blocks
    changes = [line.split() for line in lines if line.startswith("outputs change by")]
    assert len(changes) == 2
    assert all(float(words[3].rstrip(",")) < 1e-9 and float(words[-1]) > 1e-3 for words in changes)
    accuracy = {line[:24].strip(): float(line.split()[-2]) for line in lines if line.endswith("%")}
    assert min(accuracy["parent 0"], accuracy["parent 1"]) > 85
    assert accuracy["fused by activations"] > accuracy["vanilla average"] + 20
    assert accuracy["fused by weights"] > accuracy["vanilla average"] + 10
