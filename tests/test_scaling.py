"""Factors of units: where they act, and the weights of the least sum of squares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxfusion
from fxfusion.balance import balanced, unbalanced
from fxfusion.certify import certify_plan
from fxfusion.groups import enlarge
from fxfusion.plan import Plan, Symmetry
from fxfusion.state import state_of
from fxfusion.symmetry import complete, random_element
from tests import zoo


class Layers(nn.Module):
    """Layers in a row, on vectors or images."""

    def __init__(self, *layers: nn.Module, images: bool = False) -> None:
        super().__init__()
        self.layers, self.images = nn.ModuleList(layers), images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run them; images are averaged before the last."""
        *first, last = self.layers
        for layer in first:
            x = layer(x)
        return last(x.mean((-2, -1)) if self.images else x)


class Split(nn.Module):
    """One layer writes queries, keys and values, which views take apart."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.all, self.out = nn.Linear(5, 24), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, by two heads of four dimensions."""
        batch, length, _ = x.shape
        packed = self.all(x)
        if self.how == "chunks":
            parts = [part.view(batch, length, 2, 4).transpose(1, 2) for part in packed.chunk(3, -1)]
        elif self.how == "an axis of three":
            parts = list(packed.view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0))
        else:  # three of every head, side by side
            parts = [part.transpose(1, 2) for part in packed.view(batch, length, 2, 12).split(4, -1)]
        mixed = functional.scaled_dot_product_attention(*parts)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 8))


def largest(model: nn.Module, *args: torch.Tensor) -> tuple[Callable[..., float], Plan]:
    """Return how much a random element of the largest group, or of another plan's, changes a model."""
    prepared = fxfusion.prepare(model.eval(), args)
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    weights = capture.canonical(model.state_dict())

    def change(other: Plan = plan) -> float:
        return certify_plan(capture, other, weights, frozenset({0}), diagnose=False).max_relative_error

    return change, plan


def exponents(plan: Plan) -> list[dict[str, float]]:
    """Return where factors act, with short names."""
    return [
        {f"{name}[{axis}]": value for (name, axis, _), value in scaling.exponents.items()}
        for scaling in plan.scalings
    ]


def batch_norm(channels: int) -> nn.Module:
    """Return a batch normalisation with statistics and weights of its own."""
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


FACTORS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, float]]]] = {
    "relu": (
        lambda: Layers(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
        [{"layers.0.weight[0]": 1, "layers.0.bias[0]": 1, "layers.2.weight[1]": -1}],
    ),
    "leaky": (
        lambda: Layers(nn.Linear(3, 5, bias=False), nn.LeakyReLU(), nn.Linear(5, 2)),
        [{"layers.0.weight[0]": 1, "layers.2.weight[1]": -1}],
    ),
    "a slope per unit": (
        lambda: Layers(nn.Linear(3, 5, bias=False), nn.PReLU(5), nn.Linear(5, 2)),
        [{"layers.0.weight[0]": 1, "layers.2.weight[1]": -1}],
    ),
    "gelu": (lambda: Layers(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), []),
    "tanh": (lambda: Layers(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), []),
    "softmax": (lambda: Layers(nn.Linear(3, 5), nn.Softmax(-1), nn.Linear(5, 2)), []),
    # Not what is normalised, for the small number added to its variance.
    "batch norm": (
        lambda: Layers(
            nn.Conv2d(3, 5, 3), batch_norm(5), nn.ReLU(), nn.MaxPool2d(2), nn.Linear(5, 2), images=True
        ),
        [{"layers.1.weight[0]": 1, "layers.1.bias[0]": 1, "layers.4.weight[1]": -1}],
    ),
    # Both sides of a depthwise convolution have factors of their own.
    "depthwise": (
        lambda: Layers(
            nn.Conv2d(3, 5, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(5, 5, 3, groups=5),
            nn.ReLU(),
            nn.Linear(5, 2),
            images=True,
        ),
        [
            {"layers.0.weight[0]": 1, "layers.2.weight[0]": -1},
            {"layers.2.weight[0]": 1, "layers.2.bias[0]": 1, "layers.4.weight[1]": -1},
        ],
    ),
}


@pytest.mark.parametrize("name", list(FACTORS))
def test_where_factors_act(name: str) -> None:
    torch.manual_seed(0)
    build, expected = FACTORS[name]
    x = torch.randn(2, 3, 8, 8) if name in ("batch norm", "depthwise") else torch.randn(4, 3)
    change, plan = largest(build(), x)
    assert change() < 1e-9
    found = exponents(plan)
    names = sorted({name for item in (*expected, *found) for name in item})
    both, one, other = (_rank(items, names) for items in ([*expected, *found], expected, found))
    assert both == one == other == len(found) == len(expected)  # two bases of the same


def _rank(items: list[dict[str, float]], names: list[str]) -> int:
    rows = [[item.get(name, 0.0) for name in names] for item in items]
    return int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64))) if rows and names else 0


@pytest.mark.parametrize("how", ["chunks", "an axis of three", "three of every head"])
def test_keys_take_the_inverse_of_what_queries_take(how: str) -> None:
    torch.manual_seed(0)
    change, plan = largest(Split(how), torch.randn(2, 6, 5))
    assert [space.symmetry for space in plan].count(Symmetry.LINEAR) == 2
    assert change() < 1e-9
    (products,) = plan.products
    (scaling,) = [item for item in plan.scalings if item.space == products]
    assert sorted(scaling.exponents.values()) == [-1.0, -1.0, 1.0, 1.0]


class Odd(nn.Module):
    """What must not be scaled: found at random, or what a rule may overlook."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shuffle units of one space; add a number; show the units; read one weight twice."""
        x = self.first(x).relu()
        match self.what:
            case "shuffled":
                x = x + x.view(-1, 4, 2).transpose(1, 2).reshape(-1, 8).sigmoid() * x
                x = x + x.view(-1, 4, 2).transpose(1, 2).reshape(-1, 8)
            case "shifted":
                x = x + 1.0
            case "summed":
                return torch.cat([self.head(x), x.sum(-1, keepdim=True)], -1)
            case "picked":
                x = x[:, x.sum(0).argsort()]
            case "twice":
                x = self.second(self.second(x).relu())
        return self.head(x)


@pytest.mark.parametrize("what", ["shuffled", "shifted", "summed", "picked", "twice"])
def test_what_must_not_be_scaled(what: str) -> None:
    torch.manual_seed(0)
    change, plan = largest(Odd(what), torch.randn(4, 3))
    assert change() < 1e-9
    if what != "twice":
        assert not plan.scalings


# -- balance ------------------------------------------------------------------------------------------


def _squares(plan: Plan, state: Mapping[str, torch.Tensor]) -> float:
    return sum(float(state[name].square().sum()) for name in plan.layouts)


@pytest.mark.parametrize("name", ["relu", "batch norm", "depthwise"])
def test_no_weights_of_the_same_function_are_smaller(name: str) -> None:
    torch.manual_seed(0)
    model = FACTORS[name][0]().double()
    shape = (4, 3) if name == "relu" else (2, 3, 8, 8)
    prepared = fxfusion.prepare(model.eval(), (torch.randn(shape, dtype=torch.float64),))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    state, _ = balanced(plan, capture.canonical(model.state_dict()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = random_element(plan, state, generator)
        assert _squares(plan, other) > _squares(plan, state)
        assert _squares(plan, balanced(plan, other)[0]) == pytest.approx(_squares(plan, state), rel=1e-9)


@pytest.mark.parametrize("name", ["hf_vit", "gpt2", "opt", "resnet18"])
def test_balancing_keeps_the_function(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    prepared = fxfusion.prepare(model, args, kwargs)
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wide = {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in capture.canonical(model.state_dict()).items()
    }
    moved, factors = balanced(plan, wide)
    assert _squares(plan, moved) < 0.999 * _squares(plan, wide)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    other = copy.deepcopy(model).double()
    other.load_state_dict(complete(capture, moved, model.double().state_dict()))
    kwargs = {
        key: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for key, item in kwargs.items()
    }
    args = tuple(item.double() if item.is_floating_point() else item for item in args)
    with torch.no_grad():
        expected, found = model(*args, **kwargs), other(*args, **kwargs)
    expected, found = (getattr(item, "logits", item) for item in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    back = unbalanced(plan, moved, factors)
    torch.testing.assert_close(back, wide, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_a_target_is_itself_in_its_own_basis(name: str) -> None:
    """Alignment balances the parents, and takes the target's factors back from all of them."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(FACTORS[name][0]().eval())
    x = torch.randn(2, 3, 8, 8) if name in ("batch norm", "depthwise") else torch.randn(4, 3)
    aligned = fxfusion.align(models, (x,), calibration=[x], symmetry="largest", repair="none", target=1)
    for key, tensor in models[1].state_dict().items():
        torch.testing.assert_close(aligned.state_dict(1)[key], tensor, rtol=1e-5, atol=1e-6)
    other = FACTORS[name][0]().eval()
    other.load_state_dict(aligned.state_dict(0))
    torch.testing.assert_close(other(x), models[0](x), rtol=1e-4, atol=1e-5)


def test_units_that_nothing_reads_stay() -> None:
    torch.manual_seed(0)
    model = FACTORS["relu"][0]()
    first, _, last = model.layers  # type: ignore[misc]
    last.weight.data[:, 1] = 0.0
    prepared = fxfusion.prepare(model.eval(), (torch.randn(4, 3),))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    moved, _ = balanced(plan, capture.canonical(model.state_dict()))
    written = first.weight.detach()
    assert torch.equal(moved["layers.0.weight"][1], written[1])
    assert not torch.equal(moved["layers.0.weight"][0], written[0])
