"""Signs of units: where they act, and that alignment finds them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxfusion
from fxfusion.groups import enlarge
from fxfusion.layout import Block
from fxfusion.plan import Plan, Symmetry
from fxfusion.state import state_of
from fxfusion.symmetry import complete, random_element
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.joint import align
from fxfusion.transport.map import HardMap, SignMap
from tests.test_scaling import Layers, batch_norm, largest


class Gated(nn.Module):
    """A feed-forward layer with a gate."""

    def __init__(self, gate: str = "silu") -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
        self.how = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate."""
        gate: torch.Tensor = getattr(functional, self.how)(self.gate(x))
        return self.down(gate * self.up(x))


class Recurrent(nn.Module):
    """Plain recurrences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.RNN(5, 6, 2, nonlinearity=kind, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run over time."""
        return self.out(self.layers(x)[0])


class Function(nn.Module):
    """A layer, a function of its units, a layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], units: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, units), nn.Linear(units, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run."""
        return self.last(self.function(self.first(x)))


def signs(plan: Plan) -> list[set[str]]:
    """Return where signs act on parameters, with short names."""
    return [
        {f"{place.parameter}[{place.axis}]" for place in space.incidences}
        for space in plan
        if space.symmetry is Symmetry.SIGN
    ]


AROUND = {"first.weight[0]", "first.bias[0]", "last.weight[1]"}
BEFORE = {"first.weight[0]", "first.bias[0]"}
IMAGES = torch.randn(2, 3, 9, 9)
FOUND: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[set[str]]]] = {
    "odd": (lambda: Function(torch.tanh), torch.randn(4, 5), [AROUND]),
    "odd on an interval": (lambda: Function(functional.hardtanh), torch.randn(4, 5), [AROUND]),
    "clipped elsewhere": (lambda: Function(lambda x: functional.hardtanh(x, -1, 2)), torch.randn(4, 5), []),
    "even": (lambda: Function(torch.cos), torch.randn(4, 5), [BEFORE]),
    "an odd power": (lambda: Function(lambda x: x**3), torch.randn(4, 5), [AROUND]),
    "an even power": (lambda: Function(lambda x: x**4), torch.randn(4, 5), [BEFORE]),
    "odd times even": (lambda: Function(lambda x: x.tanh() * x.abs()), torch.randn(4, 5), [AROUND]),
    "odd times odd": (lambda: Function(lambda x: x.tanh() * x.sin()), torch.randn(4, 5), [BEFORE]),
    "odd plus even": (lambda: Function(lambda x: x.tanh() + x.abs()), torch.randn(4, 5), []),
    "shifted": (lambda: Function(lambda x: x.tanh() + 1), torch.randn(4, 5), []),
    "the larger": (lambda: Function(lambda x: torch.maximum(x, -x)), torch.randn(4, 5), []),
    "relu": (lambda: Function(torch.relu), torch.randn(4, 5), []),
    "gelu": (lambda: Function(functional.gelu), torch.randn(4, 5), []),
    "softmax": (lambda: Function(lambda x: x.softmax(-1)), torch.randn(4, 5), []),
    # What is gated may change sign, the gate may not.
    "a gate": (Gated, torch.randn(4, 5), [{"up.weight[0]", "up.bias[0]", "down.weight[1]"}]),
    # Two ways that meet where they are read: of three combinations, one of the two that reach most.
    "an odd gate": (
        lambda: Gated("tanh"),
        torch.randn(4, 5),
        [{"gate.weight[0]", "gate.bias[0]", "up.weight[0]", "up.bias[0]"}],
    ),
    "recurrent": (
        lambda: Recurrent("tanh"),
        torch.randn(2, 4, 5),
        [
            {
                *(f"layers.{name}{layer}[0]" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
                f"layers.weight_hh{layer}[1]",
                *readers,
            }
            for layer, readers in {
                "_l0": ["layers.weight_ih_l1[1]", "layers.weight_ih_l1_reverse[1]"],
                "_l0_reverse": ["layers.weight_ih_l1[1]", "layers.weight_ih_l1_reverse[1]"],
                "_l1": ["out.weight[1]"],
                "_l1_reverse": ["out.weight[1]"],
            }.items()
        ],
    ),
    "recurrent, rectified": (lambda: Recurrent("relu"), torch.randn(2, 4, 5), []),
    # Its weight marks the sign: what is left to choose is that of the normalised units.
    "batch norm": (
        lambda: Layers(
            nn.Conv2d(3, 5, 3), batch_norm(5), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Linear(6, 2), images=True
        ),
        IMAGES,
        [
            {
                *("layers.0.weight[0]", "layers.0.bias[0]", "layers.1.bias[0]", "layers.1.running_mean[0]"),
                "layers.2.weight[1]",
            }
        ],
    ),
    "batch norm, rectified": (
        lambda: Layers(nn.Conv2d(3, 5, 3), batch_norm(5), nn.ReLU(), nn.Linear(5, 2), images=True),
        IMAGES,
        [],
    ),
    "pooled": (
        lambda: Layers(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Linear(5, 2), images=True),
        IMAGES,
        [{"layers.0.weight[0]", "layers.0.bias[0]", "layers.3.weight[1]"}],
    ),
    "the largest of each pool": (
        lambda: Layers(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Linear(5, 2), images=True),
        IMAGES,
        [],
    ),
}


@pytest.mark.parametrize("name", list(FOUND))
def test_where_signs_act(name: str) -> None:
    make, x, expected = FOUND[name]
    torch.manual_seed(0)
    change, plan = largest(make(), x)
    assert signs(plan) == expected
    assert change(plan) < 1e-12
    for space in plan:
        if space.symmetry is Symmetry.SIGN:
            assert plan[space.scope[-1]].symmetry in (Symmetry.SIGNED, Symmetry.MONOMIAL)


@pytest.mark.parametrize("name", ["odd", "a gate", "batch norm", "recurrent"])
def test_a_forgotten_place_is_noticed(name: str) -> None:
    """A sign that does not act where it should changes the function."""
    make, x, _ = FOUND[name]
    torch.manual_seed(0)
    change, plan = largest(make(), x)
    sign = next(space for space in plan if space.symmetry is Symmetry.SIGN)
    for parameter in dict.fromkeys(place.parameter for place in sign.incidences):
        layout = plan.layouts[parameter]
        forgotten = [
            Block(
                tuple(
                    dataclasses.replace(part, factors=tuple(f for f in part.factors if f.space != sign.name))
                    for part in block.axes
                )
            )
            for block in layout.blocks
        ]
        layouts = {**plan.layouts, parameter: dataclasses.replace(layout, blocks=tuple(forgotten))}
        assert change(dataclasses.replace(plan, layouts=layouts)) > 1e-6, parameter


@pytest.mark.parametrize("coupling", ["hard", "soft"])
@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("name", ["odd", "a gate", "batch norm"])
def test_planted_signs_are_found(name: str, features: str, coupling: str) -> None:
    make, x, _ = FOUND[name]
    torch.manual_seed(0)
    model = make().eval()
    prepared = fxfusion.prepare(model, (x,))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    weights = capture.canonical(model.state_dict())
    moved = random_element(plan, weights, torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(complete(capture, moved, model.state_dict()))
    data = [torch.randn(50, *x.shape[1:]) for _ in range(4)]
    result = fxfusion.fuse(
        [model, twin],
        (x,),
        calibration=data,
        features=features,
        coupling=coupling,
        symmetry="largest",
        repair="none",
    )
    merged = copy.deepcopy(model)
    merged.load_state_dict(result.state_dict())
    torch.testing.assert_close(merged(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)


def test_assignments_and_signs_are_the_best_together() -> None:
    """By brute force over all permutations, each unit at its better sign."""
    torch.manual_seed(0)
    parents = [Function(torch.tanh, units=5).eval() for _ in range(2)]
    x = torch.randn(4, 5)
    prepared = fxfusion.prepare(parents[0], (x,))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    target, source = (capture.canonical(parent.state_dict()) for parent in parents)
    found = align(plan, target, source, Coupling()).maps
    units, sign = (found[f"first.weight[0]{suffix}"] for suffix in ("", " sign"))
    assert isinstance(units, HardMap)
    assert isinstance(sign, SignMap)
    rows = []
    for parent in parents:
        state = parent.state_dict()
        parts = [state["first.weight"], state["first.bias"][:, None], state["last.weight"].T]
        parts[1] = parts[1] - parts[1].mean()
        rows.append(torch.cat([part / part.square().mean().sqrt() for part in parts], 1).double())
    products = rows[0] @ rows[1].T
    best = max(
        itertools.permutations(range(5)),
        key=lambda order: sum(float(products[i, j].abs()) for i, j in enumerate(order)),
    )
    assert units.index.tolist() == list(best)
    assert sign.signs.flatten().tolist() == [int(products[i, j].sign()) for i, j in enumerate(best)]
