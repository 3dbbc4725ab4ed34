"""The demonstration: its network, its training, and the table; the full run is measured by hand."""

from __future__ import annotations

import builtins
import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import fxfusion
from fxfusion import checkpoints, demo
from fxfusion.errors import MissingDependencyError
from fxfusion.inputs import example_inputs, load_calibration

pytest.importorskip("sklearn")

TINY = dataclasses.replace(demo.QUICK, width=8, depth=1, epochs=1, tuning_epochs=1)


def average(models: list[Any], args: Any, kwargs: Any = None, **options: Any) -> Any:
    """Stand in for fxfusion.fuse."""
    states = [model.state_dict() for model in models]
    fused = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    report = SimpleNamespace(save_html=lambda path: Path(path).write_text(f"{options['features']}"))
    return SimpleNamespace(state_dict=lambda: fused, report=report)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxfusion, "fuse", average, raising=False)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_model_runs_at_any_batch_size() -> None:
    model = demo.DigitsViT().eval()
    images = torch.randn(5, 1, 8, 8)
    together = model(images)
    assert together.shape == (5, 10)
    assert torch.allclose(together[3:4], model(images[3:4]), atol=1e-5)


def test_example_input_comes_from_the_model() -> None:
    assert example_inputs(demo.DigitsViT()).args[0].shape == (2, 1, 8, 8)


def test_data_are_the_same_every_time() -> None:
    first, second = demo.load_digits(), demo.load_digits()
    assert torch.equal(first.images, second.images)
    assert len(first.images) == 1347
    assert len(first.test_images) == 450
    assert abs(float(first.images.mean())) < 1e-6
    assert abs(float(first.images.std()) - 1) < 1e-5


@pytest.mark.usefixtures("stand_in")
class TestRun:
    def test_table_and_files(self, tmp_path: Path) -> None:
        console = quiet()
        result = demo.run(0, tmp_path / "out", console, settings=TINY)
        assert [row.name for row in result.rows] == [
            "parent A",
            "parent B",
            "ensemble",
            "vanilla average",
            "weights, hard",
            "weights, soft",
            "activations, hard",
            "activations, soft",
        ]
        assert result["ensemble"].tuned is None
        # The stand-in is a plain average, so its line is the vanilla one.
        assert result["weights, hard"].one_shot == result["vanilla average"].one_shot
        assert result["weights, hard"].tuned == result["vanilla average"].tuned
        assert result.report.is_file()
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "vanilla average" in text
        assert str(result.report) in text
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert {
            "parent-a.safetensors",
            "fused-activations-soft.safetensors",
            "calibration.safetensors",
        } <= files

    def test_what_is_written_can_be_fused_by_hand(self, tmp_path: Path) -> None:
        demo.run(0, tmp_path, quiet(), settings=TINY)
        model = TINY.build()
        for name in ("parent-a", "parent-b", "fused-weights-hard"):
            checkpoints.load_into(model, checkpoints.read_weights(tmp_path / f"{name}.safetensors"), name)
        assert len(load_calibration(tmp_path / "calibration.safetensors", model, batch_size=1000)) == 2

    def test_seed(self, tmp_path: Path) -> None:
        results = [
            demo.run(seed, tmp_path / str(n), quiet(), settings=TINY) for n, seed in enumerate((3, 3, 4))
        ]
        assert results[0].rows == results[1].rows
        assert results[0].rows != results[2].rows
        first, second, _ = ((tmp_path / str(n) / "parent-a.safetensors").read_bytes() for n in range(3))
        assert first == second

    def test_random_state_is_left_alone(self, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        demo.run(0, tmp_path, quiet(), settings=TINY)
        assert torch.equal(before, torch.get_rng_state())


def test_parents_differ_in_initialisation_and_order() -> None:
    with demo._progress(quiet()) as progress:
        parents = [demo._train_parent(TINY, demo.load_digits(), 0, name, progress) for name in "AB"]
    assert not torch.equal(parents[0].head.weight, parents[1].head.weight)


def test_scikit_learn_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxfusion\[demo\]'"):
        demo.run(0, tmp_path / "out", quiet())
    assert not (tmp_path / "out").exists()
