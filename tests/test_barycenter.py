"""Three parents and more: aligned with one another, in shares that sum to one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.errors import OptionError
from fxfusion.pairing import Parent
from fxfusion.state import state_of
from fxfusion.symmetry import act
from fxfusion.transport.barycenter import align_together, spread_of
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.joint import align

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def perceptron(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def noisy_twins(count: int, noise: float) -> list[nn.Sequential]:
    """Return copies of one network with their units permuted and their weights disturbed."""
    models = []
    for seed in range(count):
        model = perceptron(0)
        model.load_state_dict(fxfusion.scramble(model, (X,), seed=seed))
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter) * parameter.std())
        models.append(model)
    return models


@pytest.mark.parametrize(("count", "coupling"), [(2, "hard"), (3, "soft"), (5, "soft"), (8, "hard")])
def test_shares_sum_to_one_in_every_parameter(count: int, coupling: str) -> None:
    """A parameter that is one everywhere in all parents is one everywhere in the fused network."""
    models = [perceptron(seed) for seed in range(count)]
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.ones_(parameter)
    shares = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.1
    fused = fxfusion.fuse(
        models, (X,), coupling=coupling, weights=shares.tolist(), rounds=2, regularisation=0.1
    )
    for name, tensor in fused.state_dict().items():
        if name.endswith("bias"):
            torch.testing.assert_close(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("count", [3, 5])
def test_twins_of_one_network_are_recovered(count: int) -> None:
    models = noisy_twins(count, 0.0)
    fused = fxfusion.fuse(models, (X,), coupling="hard", rounds=3).state_dict()
    for name, tensor in models[-1].state_dict().items():
        torch.testing.assert_close(fused[name], tensor, rtol=0, atol=1e-6)


def test_rounds_bring_parents_closer_and_leave_the_target_in_place() -> None:
    models = [perceptron(seed) for seed in range(5)]
    prepared = fxfusion.prepare(models[0], (X,))
    plan, capture = fxfusion.plan(prepared), state_of(prepared).capture
    states = [capture.canonical(model.state_dict()) for model in models]
    parents = [Parent(capture, plan, state) for state in states]
    coupling = Coupling()
    first = [None, *(align(plan, states[0], state, coupling) for state in states[1:])]
    names = list(plan.layouts)

    def distance(rounds: int) -> float:
        found = align_together(parents, first, 0, coupling, None, rounds)
        assert found[0] is None
        moved = [
            state if item is None else act(plan, item.maps, state)
            for item, state in zip(found, states, strict=True)
        ]
        return spread_of(moved, names)

    distances = [distance(rounds) for rounds in (0, 1, 3)]
    assert distances[1] < distances[0]
    assert distances[2] <= distances[1]


def test_spread_is_the_mean_over_pairs() -> None:
    states = [{"w": torch.randn(4, 3, dtype=torch.float64)} for _ in range(4)]
    pairs = [float((a["w"] - b["w"]).square().sum()) for i, a in enumerate(states) for b in states[i + 1 :]]
    scale = sum(float(state["w"].square().sum()) for state in states) / 4
    assert spread_of(states, ["w"]) == pytest.approx(sum(pairs) / len(pairs) / scale)


@pytest.mark.parametrize("options", [{"rounds": -1}, {"rounds": 1, "flow": fxfusion.Flow()}])
def test_rounds_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="rounds"):
        fxfusion.fuse([perceptron(0), perceptron(1)], (X,), **options)  # type: ignore[arg-type]
