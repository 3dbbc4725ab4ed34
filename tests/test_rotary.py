"""Rotary positions: which parts of a graph turn pairs of dimensions, and which angles alignment finds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxfusion
from fxfusion.certify import certify_plan
from fxfusion.groups import enlarge
from fxfusion.plan import Plan, Space, Symmetry
from fxfusion.rotary import rotary_parts
from fxfusion.state import state_of
from fxfusion.symmetry import complete, random_element
from fxfusion.transport.rotation import planar, turned
from tests.test_scaling import largest

HALVES = ((0, 4), (1, 5), (2, 6), (3, 7))
NEIGHBOURS = ((0, 1), (2, 3), (4, 5), (6, 7))
INPUTS = torch.randn(3, 5, 12)
FREQUENCIES = 0.7 ** torch.arange(4)


def halves(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Turn dimension ``i`` with ``i + n / 2``, as Llama does."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * torch.cat([FREQUENCIES[:half], FREQUENCIES[:half]])
    other = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() * scale + other * angles.sin() * scale


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """Turn dimension ``2 i`` with ``2 i + 1``, as GPT-J does."""
    angles = (torch.arange(x.shape[-2])[:, None] * FREQUENCIES).repeat_interleave(2, -1)
    other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + other * angles.sin()


def unpacked(x: torch.Tensor) -> torch.Tensor:
    """Turn neighbours, each side written out."""
    angles = torch.arange(x.shape[-2])[:, None] * FREQUENCIES
    even, odd = x[..., ::2], x[..., 1::2]
    first, second = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
    return torch.stack([first, second], -1).flatten(-2)


def after_the_first(x: torch.Tensor) -> torch.Tensor:
    """Leave the first position alone, as vision transformers do their class token."""
    return torch.cat([x[..., :1, :], halves(x[..., 1:, :])], -2)


def by_length(x: torch.Tensor) -> torch.Tensor:
    """Turn by angles that depend on what is turned."""
    angles = x.norm(dim=-1, keepdim=True)
    other = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * angles.cos() + other * angles.sin()


def mirrored(x: torch.Tensor) -> torch.Tensor:
    """Combine pairs otherwise than rotations do."""
    angles = torch.arange(x.shape[-2])[:, None] * torch.cat([FREQUENCIES, FREQUENCIES])
    other = torch.cat([x[..., 4:], x[..., :4]], -1)
    return x * angles.cos() + other * angles.sin()


def unlike(x: torch.Tensor) -> torch.Tensor:
    """Turn by another angle in each direction."""
    angles = torch.arange(x.shape[-2])[:, None] * torch.cat([FREQUENCIES, 1.3 * FREQUENCIES])
    other = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * angles.cos() + other * angles.sin()


class Attention(nn.Module):
    """Attention by two heads of eight dimensions, with keys and values for both or for each."""

    def __init__(
        self,
        queries: Callable[[torch.Tensor], torch.Tensor] = halves,
        keys: Callable[[torch.Tensor], torch.Tensor] | None = None,
        norm: bool = False,
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.turns, self.heads = (queries, keys or queries), 1 if shared else 2
        sizes = (12, 16), (12, 8 * self.heads), (12, 8 * self.heads), (16, 12)
        self.q, self.k, self.v, self.o = (nn.Linear(*size) for size in sizes)
        self.norm = nn.RMSNorm(8) if norm else nn.Identity()
        if norm:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        batch, length, _ = x.shape
        q = self.turns[0](self.norm(self.q(x).view(batch, length, 2, 8).transpose(1, 2)))
        k = self.turns[1](self.k(x).view(batch, length, self.heads, 8).transpose(1, 2))
        v = self.v(x).view(batch, length, self.heads, 8).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return self.o(mixed.transpose(1, 2).reshape(batch, length, 16))


def pairs(plan: Plan) -> list[Space]:
    return [space for space in plan if space.symmetry is Symmetry.ROTARY]


@pytest.mark.parametrize(
    ("turn", "planes"),
    [
        (halves, HALVES),
        (lambda x: halves(x, 1.7), HALVES),
        (neighbours, NEIGHBOURS),
        (unpacked, NEIGHBOURS),
        (after_the_first, HALVES),
        (lambda x: halves(neighbours(x)), None),
        (lambda x: halves(halves(x)), HALVES),
        (by_length, None),
        (mirrored, None),
        (unlike, None),
        (lambda x: halves(x.tanh()), None),
        (lambda x: halves(x + 1), None),
        (lambda x: halves(x) + x, HALVES),
    ],
)
def test_what_turns_by_pairs(
    turn: Callable[[torch.Tensor], torch.Tensor], planes: tuple[tuple[int, int], ...] | None
) -> None:
    torch.manual_seed(0)
    change, plan = largest(Attention(turn), INPUTS)
    found = pairs(plan)
    assert [space.planes for space in found] == ([] if planes is None else [planes])
    assert change(plan) < 1e-12
    for space in found:
        assert {place.parameter for place in space.incidences} == {"q.weight", "q.bias", "k.weight", "k.bias"}
        for symmetry, pairing in (
            (Symmetry.ORTHOGONAL, space.planes),
            (Symmetry.PERMUTATION, ()),
            (Symmetry.ROTARY, ((0, 3), (1, 2), (4, 7), (5, 6))),
        ):
            wrong = dataclasses.replace(space, symmetry=symmetry, planes=pairing)
            spaces = tuple(wrong if item is space else item for item in plan)
            assert change(dataclasses.replace(plan, spaces=spaces)) > 1e-6, symmetry


def test_parts_of_the_dimensions_turn() -> None:
    """The others are free to turn as they like."""

    def first(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([halves(x[..., :4]), x[..., 4:]], -1)

    torch.manual_seed(0)
    change, plan = largest(Attention(first), INPUTS)
    (space,) = pairs(plan)
    assert space.planes == ((0, 2), (1, 3))
    rest = [item.symmetry for item in plan if item.size == 4 and item is not space]
    assert rest == [Symmetry.LINEAR]
    assert change(plan) < 1e-12


def test_queries_and_keys_must_agree() -> None:
    """Where pairs of queries are not those of keys, nothing may act but the identity."""
    change, plan = largest(Attention(halves, neighbours), INPUTS)
    assert pairs(plan) == []
    assert change(plan) < 1e-12
    change, plan = largest(Attention(halves, lambda x: x), INPUTS)
    assert [space.planes for space in pairs(plan)] == [HALVES]
    assert change(plan) < 1e-12


def test_a_norm_with_weights_keeps_dimensions_in_place() -> None:
    change, plan = largest(Attention(norm=True), INPUTS)
    assert pairs(plan) == []
    assert change(plan) < 1e-12


def test_what_is_read_on_the_way_is_not_taken_as_one() -> None:
    class Open(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            other = torch.cat([-x[..., 4:], x[..., :4]], -1)
            angles = torch.arange(x.shape[-2])[:, None] * torch.cat([FREQUENCIES, FREQUENCIES])
            return x * angles.cos() + other * angles.sin(), other

    prepared = fxfusion.prepare(Open(), (torch.randn(2, 3, 8),))
    assert rotary_parts(state_of(prepared).capture) == ()


def test_a_parameter_that_is_turned() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(5, 8))
            self.keys = nn.Linear(3, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (halves(self.queries) @ self.keys(x).mT).softmax(-1) @ x

    model, x = Turned(), torch.randn(2, 6, 3)
    prepared = fxfusion.prepare(model, (x,))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    assert pairs(plan) == []
    assert certify_plan(capture, plan, capture.canonical(model.state_dict()), frozenset({0})).ok


def test_what_is_said_of_turned_parameters() -> None:
    """Every axis has its explanation, and the picture its nodes."""
    _, plan = largest(Attention(), INPUTS)
    (space,) = pairs(plan)
    for name in plan.parameters:
        for axis in plan.explain(name):
            assert axis.parts
    assert any(part.space == space.name for part in plan.explain("k.weight", 0)[0].parts)
    shown = [facts["symmetry"] for _, facts in plan.graph.nodes(data=True) if facts["kind"] == "space"]
    assert "rotations of pairs" in shown


def test_positions_that_are_given_keep_dimensions_in_place() -> None:
    class Given(nn.Module):
        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            other = torch.cat([-x[..., 4:], x[..., :4]], -1)
            angles = positions[:, None] * torch.cat([FREQUENCIES, FREQUENCIES])
            return x * angles.cos() + other * angles.sin()

    prepared = fxfusion.prepare(Given(), (torch.randn(2, 3, 8), torch.arange(3.0)))
    assert rotary_parts(state_of(prepared).capture) == ()


@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("turn", [halves, neighbours])
def test_planted_angles_are_found(turn: Callable[[torch.Tensor], torch.Tensor], features: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(turn, shared=False).eval(), torch.randn(3, 5, 12)
    prepared = fxfusion.prepare(model, (x,))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    moved = random_element(plan, capture.canonical(model.state_dict()), torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(complete(capture, moved, model.state_dict()))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    data = [torch.randn(50, 5, 12) for _ in range(4)]
    errors = {}
    for symmetry in ("permutation", "largest"):
        result = fxfusion.fuse(
            [model, twin], (x,), calibration=data, features=features, symmetry=symmetry, repair="none"
        )
        merged = copy.deepcopy(model)
        merged.load_state_dict(result.state_dict())
        errors[symmetry] = float((merged(x) - model(x)).detach().abs().max())
    assert errors["largest"] < 1e-3
    assert errors["permutation"] > 10 * errors["largest"]


def test_planar_rotations_are_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    cross = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    found, best = planar(cross, HALVES)
    eye = torch.eye(8, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found @ found.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close((found * cross).sum((-2, -1)), best)
    for angle in torch.linspace(0, 2 * torch.pi, 200):
        for pair in range(4):
            angles = torch.zeros(4, dtype=torch.float64)
            angles[pair] = angle
            other = turned(angles, HALVES, 8) @ found
            assert ((other * cross).sum((-2, -1)) <= best + 1e-12).all()


def test_rotations_of_pairs_commute() -> None:
    first, second = (turned(torch.randn(5, 4, dtype=torch.float64), NEIGHBOURS, 8) for _ in range(2))
    torch.testing.assert_close(first @ second, second @ first)


def test_angles_are_learned() -> None:
    torch.manual_seed(0)
    models, x = [Attention().eval() for _ in range(2)], torch.randn(3, 5, 12)
    data = [torch.randn(20, 5, 12) for _ in range(5)]
    results = {
        rounds: fxfusion.fuse(
            models,
            (x,),
            calibration=data,
            symmetry="largest",
            repair="none",
            refine=fxfusion.Refinement(steps=rounds) if rounds else None,
        )
        for rounds in (0, 60)
    }
    wanted = sum(model(data[0]) for model in models) / 2
    errors = {}
    for rounds, result in results.items():
        merged = copy.deepcopy(models[0])
        merged.load_state_dict(result.state_dict())
        errors[rounds] = float((merged(data[0]) - wanted).detach().square().mean())
    assert errors[60] < errors[0]
