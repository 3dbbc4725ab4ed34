"""What weighs the transports of skips and branches: the values that are added, or outputs of layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion import Flow, Observe
from fxfusion.calibration import Batches
from fxfusion.errors import CalibrationMismatchError
from fxfusion.pairing import Parent
from fxfusion.state import state_of
from fxfusion.transport.carry import Join, carry
from fxfusion.transport.magnitudes import magnitudes


class Block(nn.Module):
    """Two residual connections, of which the first is no layer's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for hidden in (7, 8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Stream(nn.Module):
    """A class token and patches with positions, two blocks, and a head."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.token, self.patches = nn.Parameter(torch.randn(1, 1, width)), nn.Linear(6, width)
        self.positions = nn.Parameter(torch.randn(1, 4, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.positions

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), self.patches(x)], 1)


SCALINGS = {
    "raw": lambda rows: rows,
    "centred": lambda rows: rows - rows.mean(0),
    "standardised": lambda rows: (rows - rows.mean(0)) / rows.std(0),
    "unit": lambda rows: rows / rows.norm(dim=0),
}


def measured(model: Stream, x: torch.Tensor, flow: Flow) -> list[list[torch.Tensor]]:
    """Return the magnitudes of skip and branch, join by join; nothing for a table of parameters."""
    state = state_of(fxfusion.prepare(model, (x[:2],)))
    plan = fxfusion.plan(model, (x[:2],))
    parent = Parent(state.capture, plan, {name: item.detach() for name, item in model.named_parameters()})
    carried = carry(state.capture, plan, flow)
    found = magnitudes(parent, carried, Batches(state.capture, [x[:7], x[7:]]), flow, Observe())
    joins = [item for item in carried.transports() if isinstance(item, Join)]
    return [[found[node, join.stream] for node in join.nodes if node] for join in joins]


@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize("by", ["streams", "layers"])
def test_skips_and_branches_are_measured(by: str, scaling: str) -> None:
    torch.manual_seed(0)
    model, x = Stream().double(), torch.randn(11, 3, 6, dtype=torch.float64)
    costs = fxfusion.Costs(activations=scaling)
    found = measured(model, x, Flow("weighted_matrix", magnitudes=by, tables="own", costs=costs))
    scale = SCALINGS[scaling if by == "layers" else "raw"]

    def size(*values: torch.Tensor) -> torch.Tensor:
        return sum(scale(value.detach().flatten(0, 1)) for value in values).abs().mean(0)

    stream = model.embed(x)
    expected = [[size(model.patches(x) if by == "layers" else model.tokens(x))]]
    for block in model.blocks:
        assert isinstance(block, Block)
        first = block.first(stream)
        middle = stream + first
        second = block.second(middle)
        skip = [stream, first] if by == "layers" else [middle]
        expected += [[size(stream), size(first)], [size(*skip), size(second)]]
        stream = middle + second
    torch.testing.assert_close(found, expected)


def test_standardised_layers_weigh_almost_alike() -> None:
    torch.manual_seed(0)
    model, x = Stream().double(), torch.randn(200, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("blocks.0.first.2.weight").mul_(100.0)
    spread = {}
    for by in ("streams", "layers"):
        _, (skip, branch), *_ = measured(model, x, Flow("weighted_matrix", magnitudes=by, tables="own"))
        spread[by] = float((branch / skip).mean())
    assert spread["streams"] > 20
    assert 0.8 < spread["layers"] < 1.25


def test_weights_may_be_compared_and_activations_weigh() -> None:
    torch.manual_seed(0)
    models, x = [Stream(), Stream()], torch.randn(11, 3, 6)
    fused = {
        residual: fxfusion.fuse(
            models, (x[:2],), calibration=[x], features="weights", coupling="soft", flow=Flow(residual)
        )
        for residual in ("mean", "weighted_scalar", "weighted_matrix")
    }
    states = [result.state_dict()["norm.weight"] for result in fused.values()]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(states, 2))
    same = [result.state_dict()["patches.weight"] for result in fused.values()]
    assert all(torch.equal(item, same[0]) for item in same)  # before the first join nothing is weighed


@pytest.mark.parametrize("features", ["weights", "activations"])
def test_one_sample_is_too_few_to_weigh_by(features: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.last = nn.Linear(6, 5), Block(5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(self.embed(x)))

    x = torch.randn(4, 6)
    options = {"calibration": [x[:1]], "features": features, "flow": Flow("weighted_matrix")}
    with pytest.raises(CalibrationMismatchError, match="fewer than 2 samples"):
        fxfusion.fuse([Pooled(), Pooled()], (x,), **options)  # type: ignore[arg-type]
