"""The line between aligned parents: loss, accuracy, and the barrier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import fxfusion
from fxfusion import Curve
from fxfusion.barrier import labelled
from fxfusion.cli import app
from fxfusion.errors import CalibrationMismatchError, OptionError
from fxfusion.state import state_of
from tests import zoo


def perceptron() -> nn.Module:
    """Return a network that a command line can name."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def given() -> dict[str, Any]:
    torch.manual_seed(0)
    models = [perceptron(), perceptron()]
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    return {
        "models": models,
        "args": (x,),
        "calibration": [x],
        "evaluation": [(x[:40], y[:40]), (x[40:], y[40:])],
    }


def test_the_barrier_is_what_rises_above_the_straight_line() -> None:
    curve = Curve("vanilla", (0.0, 0.25, 0.5, 1.0), (1.0, 1.75, 1.0, 2.0), (0.0,) * 4)
    assert curve.barrier == pytest.approx(0.5)
    assert Curve("vanilla", (0.0, 0.5, 1.0), (1.0, 0.5, 2.0), (0.0,) * 3).barrier == 0.0


def test_ends_are_the_parents_and_the_middle_is_the_fusion() -> None:
    arguments = given()
    report = fxfusion.barrier(**arguments, points=3, methods=["vanilla", "permutation"])
    x = torch.cat([batch[0] for batch in arguments["evaluation"]])
    y = torch.cat([batch[1] for batch in arguments["evaluation"]])
    for place, model in ((0, arguments["models"][0]), (-1, arguments["models"][1])):
        logits = model(x)
        for curve in report.curves:
            assert curve.losses[place] == pytest.approx(
                float(functional.cross_entropy(logits, y).detach()), rel=1e-5
            )
            assert curve.accuracies[place] == pytest.approx(
                100 * float((logits.argmax(-1) == y).float().mean())
            )
    del arguments["evaluation"]
    for name in ("vanilla", "permutation"):
        fused = fxfusion.fuse(**arguments, method=name).module(x)
        assert report[name].losses[1] == pytest.approx(
            float(functional.cross_entropy(fused, y).detach()), rel=1e-5
        )
    with pytest.raises(KeyError):
        report["orthogonal"]


def test_a_planted_twin_has_no_barrier() -> None:
    arguments = given()
    first = arguments["models"][0]
    twin = perceptron()
    twin.load_state_dict(fxfusion.scramble(first, arguments["args"], seed=1))
    report = fxfusion.barrier(**arguments | {"models": [first, twin]}, methods=["permutation"], points=5)
    assert report["permutation"].barrier == pytest.approx(0.0, abs=1e-6)
    assert len(set(report["permutation"].accuracies)) == 1


def test_labels_that_do_not_count() -> None:
    """Positions of a language model's padding."""
    args, kwargs = zoo.inputs("gpt2", 2)
    models = [zoo.build("gpt2", seed) for seed in range(2)]
    ids = kwargs["input_ids"]
    labels = ids.roll(-1, 1).masked_fill(torch.arange(ids.shape[1]) > 4, -100)
    report = fxfusion.barrier(
        models, args, kwargs, evaluation=[{**kwargs, "labels": labels}], points=3, methods=["vanilla"]
    )
    logits = models[0](**kwargs).logits[:, :5].flatten(0, 1)
    expected = float(functional.cross_entropy(logits, labels[:, :5].flatten()).detach())
    assert report["vanilla"].losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"models": [nn.Linear(4, 3)]}, OptionError),
        ({"points": 2}, OptionError),
        ({"methods": ["auto"]}, OptionError),
        ({"methods": []}, OptionError),
        ({"evaluation": [torch.randn(3, 4)]}, CalibrationMismatchError),
        ({"evaluation": [(torch.randn(3, 4), torch.randn(3))]}, CalibrationMismatchError),
        ({"evaluation": [(torch.randn(3, 4), torch.zeros(2, dtype=torch.int64))]}, CalibrationMismatchError),
        ({"evaluation": []}, CalibrationMismatchError),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        fxfusion.barrier(**given() | change)


def test_labels_go_with_their_inputs() -> None:
    arguments = given()
    capture = state_of(fxfusion.prepare(arguments["models"][0], arguments["args"])).capture
    found = labelled(capture, iter(arguments["evaluation"]))
    assert [len(labels) for _, labels in found] == [40, 24]
    for ((args, _), labels), (x, y) in zip(found, arguments["evaluation"], strict=True):
        assert torch.equal(args[0], x)
        assert torch.equal(labels, y)


# -- align --------------------------------------------------------------------------------------------


def test_aligned_parents_keep_their_function_and_average_with_any_weights() -> None:
    arguments = given()
    del arguments["evaluation"]
    aligned = fxfusion.align(**arguments)
    x = arguments["args"][0]
    assert len(aligned) == 2
    for index, model in enumerate(arguments["models"]):
        copied = perceptron()
        copied.load_state_dict(aligned.state_dict(index))
        torch.testing.assert_close(copied(x), model(x))
    for weights in ([1.0, 3.0], [0.5, 0.5]):
        fused = fxfusion.fuse(**arguments, weights=weights).state_dict()
        for name, tensor in aligned.average(weights).items():
            torch.testing.assert_close(tensor, fused[name])
    with pytest.raises(OptionError):
        aligned.average([1.0])
    with pytest.raises(OptionError):
        fxfusion.align(**arguments, method="auto")


# -- command line -------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = []
    for name in ("a", "b"):
        save_file(perceptron().state_dict(), tmp_path / f"{name}.safetensors")
        names.append(f"tests.test_barrier:perceptron@{tmp_path / name}.safetensors")
    rng = np.random.default_rng(0)
    data = tmp_path / "test.npz"
    np.savez(data, input=rng.normal(size=(30, 4)).astype(np.float32), labels=rng.integers(0, 3, 30))
    written = [tmp_path / "barrier.svg", tmp_path / "barrier.json"]
    command = ["barrier", *names, "--evaluation", str(data), "--calibration", str(data), "--points", "5"]
    command += ["--methods", "vanilla, learned", "--refine", "3"]
    result = CliRunner().invoke(app, [*command, "--plot", str(written[0]), "--json", str(written[1])])
    assert result.exit_code == 0, result.output
    assert "learned" in result.output
    curves = json.loads(written[1].read_text())
    assert curves.keys() == {"vanilla", "learned"}
    assert len(curves["learned"]["losses"]) == 5
    assert "<svg" in written[0].read_text()
    np.savez(data, input=np.zeros((30, 4), np.float32))
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "labels" in refused.output
