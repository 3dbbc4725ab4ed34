"""Where an inner space may move differently for each unit of an outer one, and where not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxfusion
from fxfusion.testing import check_model


class Attention(nn.Module):
    """Self-attention with heads; optionally a scale per unit that all heads share."""

    def __init__(self, width: int = 6, heads: int = 3, size: int = 4, shared: bool = False) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)
        self.scale = nn.Parameter(torch.rand(size) + 0.5) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        if self.scale is not None:
            q = q * self.scale
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Grouped(nn.Module):
    """Grouped convolutions one after another."""

    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 1)
        self.second = nn.Conv1d(8, 8, 1, groups=2)
        self.third = nn.Conv1d(8, 12, 1, groups=2)
        self.last = nn.Conv1d(12, 2, 1)
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        if self.mix:
            y = y.unflatten(1, (2, 4))
            y = (y + y.sum(1, keepdim=True)).flatten(1, 2)
        return self.last(torch.relu(self.third(torch.relu(y))))


class Experts(nn.Module):
    """Experts whose outputs are weighted by a fixed order of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 7))
        self.down = nn.Parameter(torch.randn(3, 7, 2))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        outputs = torch.relu(x @ self.up) @ self.down  # [expert, batch, output]
        return (outputs * gate.T.unsqueeze(-1)).sum(0)


class Flipped(nn.Module):
    """A fixed axis in reverse order: a dependence on its units must not carry over."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 5))
        self.right = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.left.flip(1) * self.right).sum(0) + x


def scopes(plan: fxfusion.Plan) -> dict[str, tuple[str, ...]]:
    return {space.name: space.scope for space in plan.spaces}


def depths(model: nn.Module, args: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((space.size, len(space.scope)) for space in fxfusion.plan(model, tuple(args)).spaces)


def test_head_dimensions_depend_on_heads() -> None:
    model, x = Attention(), torch.randn(2, 5, 6)
    plan = fxfusion.plan(model, (x,))
    heads = next(space for space in plan.spaces if space.size == 3)
    assert scopes(plan) == {
        heads.name: (),
        "q.weight[0].0.1": (heads.name,),
        "v.weight[0].0.1": (heads.name,),
    }
    assert len(plan.wreath) == 2
    check_model(model, (x,))


def test_a_parameter_that_heads_share_forbids_the_dependence() -> None:
    model, x = Attention(shared=True), torch.randn(2, 5, 6)
    plan = fxfusion.plan(model, (x,))
    found = {space.size: [] for space in plan.spaces}  # type: dict[int, list[int]]
    for space in plan.spaces:
        found[space.size].append(len(space.scope))
    assert found == {3: [0], 4: [0, 1]}  # query and key units move alike in all heads, value units need not
    check_model(model, (x,))


def test_a_single_head_has_no_outer_space() -> None:
    assert depths(Attention(heads=1), (torch.randn(2, 5, 6),)) == [(4, 0), (4, 0)]


def test_channels_of_a_group_depend_on_it() -> None:
    model, x = Grouped(mix=False), torch.randn(2, 3, 5)
    assert depths(model, (x,)) == [(2, 0), (4, 1), (4, 1), (6, 1)]
    check_model(model, (x,))


def test_a_mix_over_groups_forbids_the_dependence_there() -> None:
    model, x = Grouped(mix=True), torch.randn(2, 3, 5)
    assert depths(model, (x,)) == [(2, 0), (4, 0), (4, 1), (6, 1)]
    check_model(model, (x,))


def test_experts_in_fixed_order_may_differ() -> None:
    model, args = Experts(), (torch.randn(4, 5), torch.randn(4, 3))
    plan = fxfusion.plan(model, args)
    (space,) = plan.spaces
    assert space.size == 7
    assert plan.scope_size(space.scope[0]) == 3
    assert [item.name for item in plan.fixed] == list(space.scope)
    check_model(model, args)


def test_a_dependence_does_not_survive_reversal() -> None:
    check_model(Flipped(), (torch.randn(2, 5),))


@pytest.mark.parametrize("seed", range(3))
def test_every_unit_of_the_outer_space_has_its_own_permutation(seed: int) -> None:
    model, x = Attention(), torch.randn(2, 5, 6)
    twin = fxfusion.scramble(model, (x,), seed=seed)
    before = model(x)
    model.load_state_dict(twin)
    assert torch.allclose(model(x), before, atol=1e-5)
