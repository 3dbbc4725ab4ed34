"""Streamed moments equal those of all data, however the data are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxfusion.capture import capture
from fxfusion.pairing import Parent
from fxfusion.planning import make_plan
from fxfusion.statistics import CrossMoments, collect, observations
from fxfusion.symmetry import act
from fxfusion.transport.map import HardMap

FAST = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def data(units: int, samples: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, units, samples, generator=generator, dtype=torch.float64) + mean


def streamed(target: torch.Tensor, source: torch.Tensor, sizes: list[int]) -> CrossMoments:
    moments = CrossMoments(target.shape[0], target.shape[1], source.shape[1])
    for left, right in zip(target.split(sizes, -1), source.split(sizes, -1), strict=True):
        moments.update(left, right)
    return moments


def agree(
    moments: CrossMoments, target: torch.Tensor, source: torch.Tensor, tolerance: float = 1e-12
) -> None:
    for batch in range(target.shape[0]):
        left, right = target[batch].double().numpy(), source[batch].double().numpy()
        count = left.shape[0]
        joint = np.cov(np.concatenate([left, right]), bias=True)
        assert np.allclose(moments.mean_target[batch].numpy(), left.mean(1), rtol=tolerance)
        assert np.allclose(moments.mean_source[batch].numpy(), right.mean(1), rtol=tolerance)
        assert np.allclose(moments.covariance[batch].numpy(), joint[:count, count:], atol=tolerance)
        variance = moments.square_target[batch].numpy() / moments.count
        assert np.allclose(variance, np.diag(joint)[:count], atol=tolerance)
        variance = moments.square_source[batch].numpy() / moments.count
        assert np.allclose(variance, np.diag(joint)[count:], atol=tolerance)


@FAST
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_moments_do_not_depend_on_batches(sizes: list[int], target: int, source: int, seed: int) -> None:
    left, right = data(target, sum(sizes), seed), data(source, sum(sizes), seed + 1)
    moments = streamed(left, right, sizes)
    assert moments.count == sum(sizes)
    agree(moments, left, right, 1e-10)


@FAST
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_moments_of_disjoint_data_add_up(first: int, second: int, seed: int) -> None:
    left, right = data(3, first + second, seed), data(2, first + second, seed + 1)
    one = streamed(left[..., :first], right[..., :first], [first])
    one.add(streamed(left[..., first:], right[..., first:], [second]))
    agree(one, left, right, 1e-10)


def test_adding_nothing_changes_nothing() -> None:
    left = data(3, 5, 0)
    moments = streamed(left, left, [5])
    moments.add(CrossMoments(2, 3, 3))
    agree(moments, left, left)
    empty = CrossMoments(2, 3, 3)
    empty.add(CrossMoments(2, 3, 3))
    assert empty.count == 0
    assert (empty.covariance == 0).all()
    assert (empty.correlation == 0).all()


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_correlation_equals_numpy(mean: float) -> None:
    left = data(3, 40, 0, mean)
    right = data(3, 40, 1, mean) + left
    moments = streamed(left, right, [7] * 5 + [5])
    for batch in range(2):
        expected = np.corrcoef(left[batch].numpy(), right[batch].numpy())[:3, 3:]
        assert np.allclose(moments.correlation[batch].numpy(), expected, atol=1e-8)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    left, right = data(4, 200, 0, 1e6), data(4, 200, 1, -1e6)
    right = right + left
    agree(streamed(left, right, [50] * 4), left, right, 1e-7)


def test_float32_samples_of_large_mean() -> None:
    left, right = data(3, 400, 0, 1e4).float(), data(3, 400, 1, 1e4).float()
    agree(streamed(left, right, [100] * 4), left, right, 1e-3)


def test_a_unit_that_does_not_vary_correlates_with_nothing() -> None:
    left = data(3, 10, 0)
    left[:, 1] = 4.0
    correlation = streamed(left, left, [4, 6]).correlation
    assert (correlation[:, 1] == 0).all()
    assert (correlation[:, :, 1] == 0).all()
    assert torch.allclose(correlation[:, 0, 0], torch.ones(2, dtype=torch.float64))


class Packed(nn.Module):
    """Two layers with a hidden space that is seen at several nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("samples", [1023, 1024, 2500])
def test_many_samples_are_added_in_parts(samples: int) -> None:
    left, right = data(3, samples, 0, mean=5.0), data(2, samples, 1, mean=-3.0)
    agree(streamed(left, right, [samples]), left, right, 1e-10)


class Outer(nn.Module):
    """Two sets of hidden units in one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(18, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)[:, :, None] * self.gate(x)[:, None, :]).flatten(1))


def test_units_of_another_space_are_no_samples() -> None:
    """In another order they would be others: what a unit does is averaged over them."""
    torch.manual_seed(0)
    model, x = Outer(), torch.randn(12, 4)
    captured = capture(model, (x[:4],))
    plan = make_plan(captured, frozenset([0]))
    up, gate = (next(s.name for s in plan.spaces if s.name.startswith(name)) for name in ("up", "gate"))
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    turned = act(plan, {gate: HardMap((), torch.tensor([2, 0, 1]))}, state)
    moments = collect([Parent(captured, plan, item) for item in (state, turned)], 0, [((x,), {})])
    places = observations(plan, captured.module.graph)
    (number,) = (n for n, place in enumerate(places[up]) if "relu" in place.node)
    with torch.no_grad():
        outer = model.up(x)[:, :, None] * model.gate(x)[:, None, :]
    expected = outer.relu().mean(2).T[None]
    agree(moments[1][up][number], expected, expected, 1e-5)


def test_collected_moments_are_those_of_the_activations() -> None:
    torch.manual_seed(0)
    models = [Packed(), Packed()]
    x = torch.randn(12, 4)
    captured = capture(models[0], (x[:4],))
    plan = make_plan(captured, frozenset([0]))
    (space,) = plan.spaces
    places = observations(plan, captured.module.graph)[space.name]
    states = [{name: tensor.detach() for name, tensor in model.named_parameters()} for model in models]
    moments = collect(
        [Parent(captured, plan, state) for state in states], 0, [((x[:5],), {}), ((x[5:],), {})]
    )
    assert moments[0] == {}
    assert len(moments[1][space.name]) == len(places) == 2
    for place, found in zip(places, moments[1][space.name], strict=True):
        seen = [model.up(x).detach() for model in models]
        if "relu" in place.node:
            seen = [item.relu() for item in seen]
        agree(found, seen[0].T.unsqueeze(0), seen[1].T.unsqueeze(0), 1e-5)
