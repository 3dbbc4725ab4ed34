"""Spaces on two axes of one parameter: assignments of quadratic cost, and recurrent networks."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import quadratic_assignment
from torch import nn

import fxfusion
from fxfusion.groups import enlarge
from fxfusion.state import state_of
from fxfusion.symmetry import complete, random_element
from fxfusion.transport.coupled import Matched, Quadratic, Square, _Point


def problem(size: int, seed: int, signed: bool = False, noise: float = 0.0) -> tuple[Quadratic, Matched]:
    """Return a problem of two squares and a linear part, and the planted solution."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    index = torch.randperm(size, generator=generator)
    signs = draw(size).sign() if signed else torch.ones(size, dtype=torch.float64)
    sources = draw(size, size, 2), draw(size, size, 1)
    vertex = torch.eye(size, dtype=torch.float64)[index]
    squares = []
    for number, source in enumerate(sources):
        acts = signed and not number
        side = vertex * signs[:, None] if acts else vertex
        moved = torch.einsum("ia,abf,jb->ijf", side, source, side)
        squares.append(Square(moved + noise * draw(*moved.shape), source, acts))
    plain = draw(size, size) * noise
    linear = draw(size, size) * noise if signed else torch.zeros(size, size, dtype=torch.float64)
    found = Quadratic(plain, linear, squares, signed)
    return found, Matched(index, signs, found.value(index, signs))


def in_place(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(size), torch.ones(size, dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", [3, 12, 40])
def test_planted_assignments_are_found(size: int, signed: bool) -> None:
    for seed in range(5):
        found, planted = problem(size, seed, signed)
        solved = found.solve(*in_place(size))
        assert solved.index.tolist() == planted.index.tolist()
        if signed:  # all signs may change together, since they act on both axes
            assert abs(float((solved.signs * planted.signs).sum())) == size


@pytest.mark.parametrize("signed", [False, True])
def test_by_brute_force(signed: bool) -> None:
    """Of a quadratic cost, no method is sure of the least; of four units, it is found nearly always."""
    reached = 0
    for seed in range(10):
        found, _ = problem(4, seed, signed, noise=0.5)
        choices = itertools.product([1.0, -1.0], repeat=4) if signed else [(1.0,) * 4]
        best = min(
            found.value(torch.tensor(order), torch.tensor(signs, dtype=torch.float64))
            for signs in choices
            for order in itertools.permutations(range(4))
        )
        value = found.solve(*in_place(4)).value
        assert value >= best - 1e-9
        reached += value < best + 1e-9
    assert reached >= (6 if signed else 8)


def test_no_worse_than_where_it_starts() -> None:
    for seed in range(20):
        found, _ = problem(10, seed, bool(seed % 2), noise=3.0)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(10, generator=generator)
        signs = torch.randn(10, generator=generator, dtype=torch.float64).sign()
        signs = signs if seed % 2 else torch.ones_like(signs)
        assert found.solve(index, signs).value <= found.value(index, signs)


def test_gradients() -> None:
    found, _ = problem(6, 0, signed=True, noise=1.0)
    sides = [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    plain, signed = sides
    total = (found.linear.plain * plain).sum() + (found.linear.signed * signed).sum()
    for square in found.squares:
        side = signed if square.signed else plain
        total = total - (square.target * torch.einsum("ia,abf,jb->ijf", side, square.source, side)).sum()
    total.backward()
    gradient = found._gradient(_Point(plain.detach(), signed.detach()))
    torch.testing.assert_close(gradient.plain, plain.grad)
    torch.testing.assert_close(gradient.signed, signed.grad)


def test_beside_scipy() -> None:
    """One square and no linear part is what SciPy's FAQ solves, from the centre alone."""
    ours, theirs = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        target, source = torch.randn(2, 15, 15, 1, generator=generator, dtype=torch.float64)
        zeros = torch.zeros(15, 15, dtype=torch.float64)
        found = Quadratic(zeros, zeros, [Square(target, source)], has_signs=False)
        ours.append(found.solve(*in_place(15)).value)
        options = {"maximize": True, "rng": np.random.default_rng(0)}
        theirs.append(
            -quadratic_assignment(target[..., 0].numpy(), source[..., 0].numpy(), options=options).fun
        )
    assert sum(ours) <= sum(theirs) + 1e-6


class Recurrent(nn.Module):
    """A recurrent layer and a classifier."""

    def __init__(self, kind: str, units: int) -> None:
        super().__init__()
        self.layer = {"tanh": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](3, units, batch_first=True)
        self.out = nn.Linear(units, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Read the last output."""
        return self.out(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("symmetry", ["permutation", "largest"])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_recurrent_layers_are_matched_by_what_they_feed_back(kind: str, symmetry: str) -> None:
    """All else is noise here, so that recurrent weights alone say which unit is which."""
    torch.manual_seed(0)
    model, x = Recurrent(kind, 24).eval(), torch.randn(4, 6, 3)
    prepared = fxfusion.prepare(model, (x,))
    capture = state_of(prepared).capture
    plan = fxfusion.plan(prepared) if symmetry == "permutation" else enlarge(capture, fxfusion.plan(prepared))
    moved = random_element(plan, capture.canonical(model.state_dict()), torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(complete(capture, moved, model.state_dict()))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    hidden = dict(twin.named_parameters())["layer.weight_hh_l0"].detach().clone()
    for name, parameter in twin.named_parameters():
        if name != "layer.weight_hh_l0":
            parameter.data += 1.5 * parameter.std() * torch.randn_like(parameter)
    result = fxfusion.fuse(
        [twin, model], (x,), features="weights", symmetry=symmetry, weights=[0.0, 1.0], target=0
    )
    found = result.state_dict()["layer.weight_hh_l0"]
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-6)
