"""Repair of units: the fused network's layers have the parents' average mean and deviation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import CalibrationRequiredError
from tests import zoo


class Mixed(nn.Module):
    """A convolution, a layer called twice, one without a bias, and others."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.plain = nn.Linear(width, width, bias=False)
        self.first, self.again, self.last = nn.Linear(width, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute."""
        x = self.plain(self.conv(x).relu().mean((2, 3)))
        x = self.again(self.again(self.first(x).tanh()).tanh())
        return self.last(x.tanh())


def outputs(model: nn.Module, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Return what layers write, ``[units, samples]``."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_hook(
            lambda _, __, value, name=name: found.update({name: value.movedim(1, 0).flatten(1)})
        )
    with torch.no_grad():
        model(x)
    return found


def test_units_get_mean_and_deviation_of_the_parents() -> None:
    torch.manual_seed(0)
    parents = [Mixed(), Mixed()]
    x = torch.randn(64, 2, 5, 5)
    plain, repaired = (
        fxfusion.fuse(parents, (x[:2],), calibration=[x], weights=[0.25, 0.75], repair=repair)
        for repair in ("norms", "units")
    )
    aligned = [
        fxfusion.fuse(parents, (x[:2],), calibration=[x], weights=weights, repair="none")
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    models = []
    for result in (*aligned, plain, repaired):
        models.append(copy.deepcopy(parents[1]))
        models[-1].load_state_dict(result.state_dict())
    names = ["conv", "first", "last"]
    seen = [outputs(model, x, names) for model in models]
    for name in names:
        for measure in (torch.mean, torch.std):
            left, right, without, with_ = (measure(item[name], -1) for item in seen)
            expected = 0.25 * left + 0.75 * right
            torch.testing.assert_close(with_, expected, rtol=1e-3, atol=1e-4)
        if name != "conv":  # without what comes before, averaging keeps them nearly
            assert float((without / expected - 1).abs().max()) > 0.05, "deviations did not need repair"
    for name in ("plain.weight", "again.weight", "again.bias"):  # no bias; called twice
        assert torch.equal(plain.state_dict()[name], repaired.state_dict()[name])


@pytest.mark.parametrize("name", ["hf_vit", "gpt2"])
def test_equal_parents_are_not_changed(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    result = fxfusion.fuse(
        [model, copy.deepcopy(model)],
        args,
        kwargs,
        calibration=[kwargs],
        symmetry="permutation",  # larger ones fold norms
        repair="units",
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(result.state_dict()[key], tensor), key


def test_what_repair_needs() -> None:
    model = Mixed()
    with pytest.raises(CalibrationRequiredError, match="units"):
        fxfusion.fuse([model, model], (torch.randn(2, 2, 5, 5),), repair="units")


def test_units_of_parents_of_other_widths_are_repaired() -> None:
    x = torch.randn(16, 2, 5, 5)
    models = [Mixed(8), Mixed()]
    plain, repaired = (
        fxfusion.fuse(models, (x,), calibration=[x], symmetry="permutation", repair=repair).state_dict()
        for repair in ("norms", "units")
    )
    assert plain.keys() == repaired.keys() == models[1].state_dict().keys()
    assert any(not torch.equal(plain[name], repaired[name]) for name in plain)
