"""The other way into a model: traced on its example, under its own names, with what it writes kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import CaptureError
from fxfusion.specialise import specialise


class Branching(nn.Module):
    """Asks a tensor which way to go, and writes into a slice on one way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.tied = self.second
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.register_buffer("place", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor, *, double: bool = False) -> dict[str, torch.Tensor]:
        y = self.first(x) * self.scale
        if bool((y.sum() > -1e9).item()):
            y = y.relu()
            y[:1] += self.shift
        scores = self.tied(y) + self.place
        return {"logits": scores * 2 if double else scores}


def test_it_computes_what_the_model_computes_under_the_same_names() -> None:
    model, x = Branching().train(), torch.randn(4, 6)
    with pytest.raises(CaptureError, match=r"fxfusion\.specialise"):
        fxfusion.plan(model, (x,))
    traced = specialise(model, (x,), {"double": True})
    assert model.training
    assert list(traced.state_dict()) == list(model.state_dict())
    assert dict(traced.named_parameters())["first.weight"] is model.first.weight
    for other in (x, torch.randn(4, 6)):
        expected = model(other, double=True)["logits"]
        torch.testing.assert_close(traced(other, double=True)["logits"], expected)
    with pytest.raises(TypeError, match="other inputs"):
        traced(x)


def test_it_is_planned_certified_and_fused() -> None:
    x = torch.randn(4, 6)
    parents = [Branching(), Branching()]
    traced = [specialise(parent, (x,)) for parent in parents]
    assert [space.size for space in fxfusion.plan(traced[0], (x,)).spaces] == [8]
    assert fxfusion.certify(traced[0], (x,)).ok
    result = fxfusion.fuse(traced, (x,))
    parents[1].load_state_dict(result.state_dict())
    torch.testing.assert_close(parents[1](x)["logits"], result.module(x)["logits"])


def test_what_cannot_be_traced_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such luck")

    with pytest.raises(CaptureError, match="Broken cannot be traced on these inputs either: ValueError"):
        specialise(Broken(), (torch.randn(2),))
