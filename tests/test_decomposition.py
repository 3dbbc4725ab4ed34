"""Operators without a rule are typed by what they are made of, where that is known for sure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxfusion
from fxfusion.decomposition import Decomposer
from fxfusion.plan import Plan, Role

aten = torch.ops.aten


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    """Operators that are no part of torch: one that says what it is made of, and one that does not."""
    made = torch.library.Library("decomposed", "DEF")
    made.define("project(Tensor x, Tensor w) -> Tensor")
    made.impl(
        "project", lambda x, w: nn.functional.linear(x, w).erfinv_().relu(), "CompositeImplicitAutograd"
    )
    made.define("opaque(Tensor x) -> Tensor")
    made.impl("opaque", lambda x: x * 2, "CompositeExplicitAutograd")
    made.define("wrapped(Tensor x, Tensor w) -> Tensor")
    made.impl(
        "wrapped",
        lambda x, w: torch.ops.decomposed.opaque(x) @ w.transpose(0, 1),
        "CompositeImplicitAutograd",
    )
    yield made
    made._destroy()


class Custom(nn.Module):
    """A layer, an operator that takes a weight, a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(7, 5)
        self.weight, self.name = nn.Parameter(torch.randn(7, 8)), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(getattr(torch.ops.decomposed, self.name)(self.before(x), self.weight))


def certified(model: nn.Module, *args: torch.Tensor) -> Plan:
    prepared = fxfusion.prepare(model, args)
    assert fxfusion.certify(prepared).ok
    return fxfusion.plan(prepared)


def test_a_parameter_stays_one_inside(library: torch.library.Library) -> None:
    model = Custom("project")
    prepared = fxfusion.prepare(model, (torch.randn(3, 6),))
    assert any(node.target is torch.ops.decomposed.project.default for node in prepared.graph.nodes)
    plan = fxfusion.plan(prepared)
    assert sorted(space.size for space in plan.spaces) == [7, 8]
    roles = {(item.parameter, item.axis): item.role for space in plan.spaces for item in space.incidences}
    assert roles["weight", 1] is Role.READS
    assert roles["weight", 0] is Role.WRITES
    assert not plan.limits


def test_what_is_frozen_inside_names_both(library: torch.library.Library) -> None:
    plan = fxfusion.plan(Custom("wrapped"), (torch.randn(3, 6),))
    assert [space.size for space in plan.spaces] == [7]
    assert any(
        "decomposed.opaque.default (inside decomposed.wrapped.default)" in item.reason for item in plan.limits
    )


def test_a_decomposition_that_loses_a_write_is_refused() -> None:
    pair = (torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta"))
    assert Decomposer()(aten.complex.default, pair, {}, None) is None


@pytest.mark.parametrize(
    "target", [aten.erfinv.default, torch.ops.higher_order.cond, aten.relu_.default, len], ids=str
)
def test_what_has_no_decomposition(target: object) -> None:
    assert Decomposer()(target, (torch.empty(2, device="meta"),), {}, None) is None


def test_outputs_without_a_reader_are_not_computed() -> None:
    args = (torch.empty(2, 6, 5), torch.empty(6), torch.empty(6), 2, 6, 5, 2, 1e-5)
    decomposer = Decomposer()
    whole = decomposer(aten.native_group_norm.default, args, {}, None)
    first = decomposer(aten.native_group_norm.default, args, {}, frozenset([0]))
    assert whole is not None
    assert first is not None
    assert len(first.graph.nodes) < len(whole.graph.nodes)
    assert decomposer(aten.native_group_norm.default, args, {}, frozenset([0])) is first


def test_weight_norm_of_taps() -> None:
    """The positional convolution of wav2vec 2.0: grouped, each tap normalised over all channels."""
    taps = parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)
    model = nn.Sequential(nn.Conv1d(6, 8, 1), taps, nn.Conv1d(8, 5, 1))
    plan = certified(model, torch.randn(2, 6, 9))
    assert [space.size for space in plan.spaces] == [2, 4, 4]
    assert not plan.limits


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_normalised_weights(normalise: object) -> None:
    assert callable(normalise)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), normalise(nn.Linear(8, 7)), nn.Tanh(), nn.Linear(7, 5))
    plan = certified(model, torch.randn(3, 6))
    assert [space.size for space in plan.spaces] == [8, 7]
    assert not plan.limits
