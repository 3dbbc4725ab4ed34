"""Solvers against brute force, transports against plain indexing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import networkx as nx
import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxfusion
from fxfusion.axes import Axis, Leaf, concatenation, product
from fxfusion.errors import OptionError
from fxfusion.layout import ParameterLayout, lay_out
from fxfusion.plan import Plan, Space, Symmetry
from fxfusion.transport import assignment
from fxfusion.transport import sinkhorn as entropic
from fxfusion.transport.assignment import assign, auction
from fxfusion.transport.hierarchy import (
    Coupling,
    Ground,
    Shape,
    Tree,
    costs_of,
    identity,
    solve_tree,
    to_maps,
    trees,
)
from fxfusion.transport.map import HardMap, SoftMap, transport_tensor
from fxfusion.transport.sinkhorn import sinkhorn
from tests import zoo

FAST = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SEED = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random permutations of the last axis."""
    return random(*shape, seed=seed).argsort(-1)


# -- couplings ------------------------------------------------------------------------------------


@FAST
@given(st.integers(1, 5), SEED)
def test_assignment_is_the_best_permutation(size: int, seed: int) -> None:
    costs = random(2, size, size, seed=seed)
    index, values = assign(costs)
    for cost, chosen, value in zip(costs, index, values, strict=True):
        everything = (
            sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(size))
        )
        assert float(value) == pytest.approx(min(everything))
        assert float(cost[torch.arange(size), chosen].sum()) == pytest.approx(float(value))
        assert sorted(chosen.tolist()) == list(range(size))


@FAST
@given(st.integers(1, 12), SEED, st.sampled_from([0.5, 0.1, 0.01]), st.sampled_from([0.0, 0.1, 3.0]))
def test_an_auction_ends_within_its_gap(size: int, seed: int, gap: float, uneven: float) -> None:
    """The bound holds, and so does the gap that it certifies."""
    costs = random(2, size, size, seed=seed) * torch.exp(uneven * random(2, size, 1, seed=seed + 1))
    index, values, gaps = auction(costs, gap)
    best = assign(costs)[1]
    for chosen in index:
        assert sorted(chosen.tolist()) == list(range(size))
    paid = costs.gather(-1, index.unsqueeze(-1)).sum((-2, -1))
    assert torch.allclose(values, paid)
    assert (gaps <= gap).all()
    # Cost / (1 + gap) is the lower bound that was found: no assignment is below it.
    assert (values / (1 + gaps) <= best * (1 + 1e-6)).all()


def test_an_auction_of_equal_and_of_no_costs() -> None:
    for costs in (torch.zeros(1, 5, 5), torch.ones(1, 5, 5), 1.0 - torch.eye(5)[None].flip(-1)):
        index, values, gaps = auction(costs, 0.01)
        assert sorted(index[0].tolist()) == list(range(5))
        assert float(values) == pytest.approx(float(assign(costs)[1]))
        assert float(gaps) == pytest.approx(0.0, abs=1e-6)


def test_bids_that_are_lost_in_rounding_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two columns serve all rows but for a few units of last place, an auction would go on for ever."""
    monkeypatch.setattr(assignment, "_ROUNDS", 50)
    costs = random(1, 40, 40, seed=3) * 1e-3 + 1e6 * (random(40, seed=4) > 0.1)
    index, values, gaps = auction(costs, 1e-6)
    assert sorted(index[0].tolist()) == list(range(40))
    assert float(values) == pytest.approx(float(assign(costs)[1]), rel=1e-6)
    assert float(gaps) <= 1e-6


def test_a_gap_is_certified_in_the_report() -> None:
    models = [zoo.small_vit(seed) for seed in range(2)]
    kwargs = {"pixel_values": torch.zeros(2, 1, 8, 8)}
    exact = fxfusion.fuse(models, kwargs=kwargs).report
    report = fxfusion.fuse(models, kwargs=kwargs, coupling=fxfusion.Coupling(gap=0.3)).report
    assert any("certified to cost at most" in note for note in report.notes)
    assert not any("certified to cost at most" in note for note in exact.notes)
    with pytest.raises(OptionError, match="gap"):
        fxfusion.Coupling(0.1, gap=0.1)
    with pytest.raises(OptionError, match="gap"):
        fxfusion.Coupling(gap=1.0)


def test_assignment_of_six() -> None:
    cost = random(1, 6, 6)
    best = min(sum(float(cost[0, i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert float(assign(cost)[1]) == pytest.approx(best)


@FAST
@given(st.integers(1, 6), SEED)
def test_assignment_is_the_plan_of_optimal_transport(size: int, seed: int) -> None:
    cost = random(1, size, size, seed=seed)
    plan = torch.nn.functional.one_hot(assign(cost)[0][0], size).double() / size
    uniform = np.full(size, 1 / size)
    assert np.allclose(plan.numpy(), ot.emd(uniform, uniform, cost[0].numpy()))


@FAST
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1e-4, 0.05, 0.3, 2.0, 1e4]), SEED)
def test_sinkhorn_has_uniform_marginals(target: int, source: int, softness: float, seed: int) -> None:
    plans, _ = sinkhorn(random(2, target, source, seed=seed), softness)
    assert torch.allclose(plans.sum(-1) * target, torch.ones(2, target).double(), atol=1e-12)
    assert torch.allclose(plans.sum(-2) * source, torch.ones(2, source).double(), atol=1e-5)
    assert (plans >= 0).all()


@FAST
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1e-3, 0.1]), SEED)
def test_sinkhorn_of_ties_and_of_units_without_mass(
    target: int, source: int, softness: float, seed: int
) -> None:
    costs = random(3, target, source, seed=seed).mul(2).round()
    rows, columns = (
        random(3, size, seed=seed + number).relu().round() + torch.eye(1, size).double()
        for number, size in enumerate((target, source))
    )
    rows, columns = rows / rows.sum(-1, keepdim=True), columns / columns.sum(-1, keepdim=True)
    plans, _ = sinkhorn(costs, softness, masses=(rows, columns))
    assert torch.allclose(plans.sum(-1), rows, atol=1e-12)
    assert torch.allclose(plans.sum(-2), columns, atol=1e-6)
    assert (plans >= 0).all()


@FAST
@given(SEED, st.sampled_from([0.03, 0.3]))
def test_sinkhorn_is_optimal(seed: int, softness: float) -> None:
    """Costs over the regularisation differ from the plan's logarithm by a sum of potentials alone."""
    costs = random(1, 7, 9, seed=seed)
    plans, _ = sinkhorn(costs, softness, absolute=True)
    assert float(plans.min()) > 0
    potentials = plans.log() * softness + costs
    crossed = potentials - potentials[:, :1] - potentials[:, :, :1] + potentials[:, :1, :1]
    assert float(crossed.abs().max()) < 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("relaxation", [None, 1.0])
def test_sinkhorn_refuses_costs_that_are_no_numbers(bad: float, relaxation: float | None) -> None:
    costs = random(2, 3, 3)
    costs[1, 0, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        sinkhorn(costs, 0.1, relaxation=relaxation)


def test_problems_of_a_batch_are_solved_alike_alone() -> None:
    costs = random(5, 12, 9) * torch.tensor([1e-3, 1.0, 30.0, 1e3, 1e6])[:, None, None]
    plans, values = sinkhorn(costs, 0.01)
    for number, cost in enumerate(costs):
        plan, value = sinkhorn(cost[None], 0.01)
        assert torch.allclose(plan[0], plans[number], atol=1e-6)
        assert float(value) == pytest.approx(float(values[number]), rel=1e-4)


def test_a_problem_of_a_batch_that_lacks_nothing_stays() -> None:
    plans = random(2, 5, 6).softmax(-1) / 5
    rows, columns = torch.full((2, 5), 1 / 5).double(), torch.full((2, 6), 1 / 6).double()
    lack = columns - plans.sum(-2)
    lack[0] = 0
    step = entropic._newton(plans, rows, columns, lack)
    assert not step[0].any()
    assert step[1].isfinite().all()
    assert step[1].any()


def test_a_nearly_hard_plan_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinkhorn's algorithm itself would take more than a thousand here."""
    taken = []
    newton = entropic._newton

    def counted(*parts: torch.Tensor) -> torch.Tensor:
        taken.append(1)
        return newton(*parts)

    monkeypatch.setattr(entropic, "_newton", counted)
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    costs = torch.cdist(left * (left[:, :1]).exp(), right * (right[:, :1]).exp()).square()
    plans, _ = sinkhorn(costs[None], 0.01)
    assert float((plans.sum(-2) * 64 - 1).abs().max()) < 1e-4
    assert len(taken) < 60


@pytest.mark.parametrize("softness", [0.1, 0.5])
def test_sinkhorn_agrees_with_pot(softness: float) -> None:
    cost = random(6, 6, seed=3)
    shifted = cost - cost.min()
    uniform = np.full(6, 1 / 6)
    expected = ot.sinkhorn(
        uniform, uniform, (shifted / shifted.mean()).numpy(), softness, stopThr=1e-12, numItermax=10000
    )
    plans, values = sinkhorn(cost.unsqueeze(0), softness)
    assert np.allclose(plans[0].numpy(), expected, atol=1e-7)
    assert float(values) == pytest.approx(6 * float((expected * cost.numpy()).sum()), rel=1e-6)


def test_little_regularisation_gives_the_assignment() -> None:
    cost = random(1, 5, 5, seed=4)
    plans, values = sinkhorn(cost, 0.005)
    index, value = assign(cost)
    assert torch.equal(plans.argmax(-1), index)
    assert float(values) == pytest.approx(float(value), rel=1e-3)


def test_a_coupling_that_is_not_exact_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    costs = random(1, 30, 30, seed=3)
    sinkhorn(costs, 0.01)
    assert not caplog.records
    monkeypatch.setattr(entropic, "_STEPS", 1)
    sinkhorn(costs, 0.01)
    assert "not exact" in caplog.text


def test_much_regularisation_gives_the_product() -> None:
    plans, _ = sinkhorn(random(1, 4, 4), 1000.0)
    assert torch.allclose(plans, torch.full_like(plans, 1 / 16), atol=1e-4)


def test_sinkhorn_ignores_shift_and_scale_of_costs() -> None:
    cost = random(1, 5, 5, seed=5)
    assert torch.allclose(sinkhorn(cost, 0.1)[0], sinkhorn(cost * 1e4 - 7e3, 0.1)[0], atol=1e-6)


# -- nested spaces --------------------------------------------------------------------------------


def nested(sizes: Mapping[str, tuple[int, tuple[str, ...]]], fixed: tuple[str, ...] = ()) -> Plan:
    """Return a plan that knows nothing but spaces, by name: size and scope."""
    spaces = [
        Space(name, size, Symmetry.FIXED if name in fixed else Symmetry.PERMUTATION, (), scope)
        for name, (size, scope) in sizes.items()
    ]
    return Plan(
        spaces=tuple(space for space in spaces if space.name not in fixed),
        fixed=tuple(space for space in spaces if space.name in fixed),
        covered=1.0,
        limits=(),
        graph=nx.MultiDiGraph(),
        layouts={},
        activations={},
    )


def grounds(costs: Mapping[str, torch.Tensor]) -> dict[str, Ground]:
    """Return costs as ground costs without offset."""
    return {name: Ground(cost) for name, cost in costs.items()}


def random_costs(plan: Plan, tree: Tree, seed: int) -> dict[str, torch.Tensor]:
    return {
        space.name: random(*Shape.of(plan, space).cost, seed=seed + number)
        for number, space in enumerate(tree.members)
    }


def two_level(heads: int, size: int) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    """Yield every permutation of heads with every permutation of units in each."""
    inner = list(itertools.permutations(range(size)))
    for outer in itertools.permutations(range(heads)):
        for units in itertools.product(inner, repeat=heads):
            yield outer, units


def cost_of(
    costs: Mapping[str, torch.Tensor],
    outer: tuple[int, ...],
    units: Mapping[str, tuple[tuple[int, ...], ...]],
) -> float:
    """Return the explicit sum: target head t takes source head outer[t], its unit i the unit units[t][i]."""
    total = sum(float(costs["heads"][0, 0, 0, t, s]) for t, s in enumerate(outer))
    for name, chosen in units.items():
        total += sum(
            float(costs[name][0, t, s, i, j]) for t, s in enumerate(outer) for i, j in enumerate(chosen[t])
        )
    return total


@pytest.mark.parametrize(("heads", "size"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_two_levels_are_solved_exactly(heads: int, size: int) -> None:
    plan = nested({"heads": (heads, ()), "units": (size, ("heads",))})
    (tree,) = trees(plan)
    for seed in range(3):
        costs = random_costs(plan, tree, seed)
        best = min(cost_of(costs, outer, {"units": units}) for outer, units in two_level(heads, size))
        solved = solve_tree(plan, tree, grounds(costs), Coupling())
        assert costs_of(plan, tree, grounds(costs), solved)["heads"] == pytest.approx(best)
        maps = to_maps(plan, tree, solved)
        outer, units = maps["heads"], maps["units"]
        assert isinstance(outer, HardMap)
        assert isinstance(units, HardMap)
        assert units.index.shape == (heads, size)
        chosen = tuple(tuple(row) for row in units.index.tolist())
        assert cost_of(costs, tuple(outer.index.tolist()), {"units": chosen}) == pytest.approx(best)


def test_two_spaces_below_heads_are_solved_exactly() -> None:
    plan = nested({"heads": (2, ()), "qk": (2, ("heads",)), "v": (3, ("heads",))})
    (tree,) = trees(plan)
    costs = random_costs(plan, tree, 7)
    best = min(
        cost_of(costs, outer, {"qk": qk, "v": v})
        for outer, qk in two_level(2, 2)
        for same, v in two_level(2, 3)
        if same == outer
    )
    found = costs_of(plan, tree, grounds(costs), solve_tree(plan, tree, grounds(costs), Coupling()))
    assert found["heads"] == pytest.approx(best)


def test_three_levels_are_solved_exactly() -> None:
    plan = nested({"a": (2, ()), "b": (2, ("a",)), "c": (2, ("a", "b"))})
    (tree,) = trees(plan)
    assert [space.name for space in tree.members] == ["a", "b", "c"]
    costs = random_costs(plan, tree, 11)
    swaps = list(itertools.permutations(range(2)))

    def total(a: tuple[int, ...], b: tuple[tuple[int, ...], ...], c: tuple[tuple[int, ...], ...]) -> float:
        found = sum(float(costs["a"][0, 0, 0, t, s]) for t, s in enumerate(a))
        for t, s in enumerate(a):
            for i, j in enumerate(b[t]):
                found += float(costs["b"][0, t, s, i, j])
                pair = (2 * t + i, 2 * s + j)
                found += sum(float(costs["c"][(0, *pair, x, y)]) for x, y in enumerate(c[2 * t + i]))
        return found

    best = min(
        total(a, b, c)
        for a in swaps
        for b in itertools.product(swaps, repeat=2)
        for c in itertools.product(swaps, repeat=4)
    )
    solved = solve_tree(plan, tree, grounds(costs), Coupling())
    assert costs_of(plan, tree, grounds(costs), solved)["a"] == pytest.approx(best)
    maps = to_maps(plan, tree, solved)
    index = {name: item.index for name, item in maps.items() if isinstance(item, HardMap)}
    a, b, c = (index[name] for name in "abc")
    assert c.shape == (2, 2, 2)
    rows = tuple(map(tuple, b.tolist())), tuple(map(tuple, c.flatten(0, 1).tolist()))
    assert total(tuple(a.tolist()), *rows) == pytest.approx(best)


def test_units_of_a_fixed_outer_space_are_solved_one_by_one() -> None:
    plan = nested({"experts": (3, ()), "units": (4, ("experts",))}, fixed=("experts",))
    (tree,) = trees(plan)
    costs = random_costs(plan, tree, 13)
    maps = to_maps(plan, tree, solve_tree(plan, tree, grounds(costs), Coupling()))
    units = maps["units"]
    assert isinstance(units, HardMap)
    assert torch.equal(units.index, assign(costs["units"][:, 0, 0])[0])


def test_a_fixed_space_above_the_inner_one_only_is_summed_out() -> None:
    plan = nested(
        {"experts": (2, ()), "heads": (2, ()), "units": (3, ("experts", "heads"))}, fixed=("experts",)
    )
    (tree,) = trees(plan)
    costs = random_costs(plan, tree, 29)
    inner = list(itertools.permutations(range(3)))

    def best_of(expert: int, t: int, s: int) -> float:
        return min(sum(float(costs["units"][expert, t, s, i, j]) for i, j in enumerate(p)) for p in inner)

    best = min(
        sum(
            float(costs["heads"][0, 0, 0, t, s]) + sum(best_of(expert, t, s) for expert in range(2))
            for t, s in enumerate(outer)
        )
        for outer in itertools.permutations(range(2))
    )
    solved = solve_tree(plan, tree, grounds(costs), Coupling())
    assert costs_of(plan, tree, grounds(costs), solved)["heads"] == pytest.approx(best)
    heads, units = (to_maps(plan, tree, solved)[name] for name in ("heads", "units"))
    assert isinstance(heads, HardMap)
    assert isinstance(units, HardMap)
    assert units.index.shape == (2, 2, 3)
    found = sum(
        float(costs["heads"][0, 0, 0, t, s])
        + sum(
            float(costs["units"][e, t, s, i, j])
            for e in range(2)
            for i, j in enumerate(units.index[e, t].tolist())
        )
        for t, s in enumerate(heads.index.tolist())
    )
    assert found == pytest.approx(best)
    soft_units = to_maps(plan, tree, solve_tree(plan, tree, grounds(costs), Coupling(0.005)))["units"]
    assert isinstance(soft_units, SoftMap)
    assert soft_units.write.shape == (2, 2, 2, 2, 3, 3)
    assert (soft_units.write[0, 1] == 0).all()
    for e in range(2):
        for t, s in enumerate(heads.index.tolist()):
            assert torch.equal(soft_units.write[e, e, t, s].argmax(-1), units.index[e, t])


def test_cost_of_the_identity_is_the_diagonal() -> None:
    plan = nested({"heads": (3, ()), "units": (4, ("heads",))})
    (tree,) = trees(plan)
    costs = random_costs(plan, tree, 17)
    found = costs_of(plan, tree, grounds(costs), identity(plan, tree))
    heads = tuple(range(3))
    expected = cost_of(costs, heads, {"units": (tuple(range(4)),) * 3})
    assert found["heads"] == pytest.approx(expected)
    assert found["units"] == pytest.approx(expected - cost_of(costs, heads, {}))


def test_a_nearly_hard_soft_solution_costs_what_the_hard_one_does() -> None:
    plan = nested({"heads": (3, ()), "units": (3, ("heads",))})
    (tree,) = trees(plan)
    costs = random_costs(plan, tree, 19)
    hard, soft = (solve_tree(plan, tree, grounds(costs), Coupling(item)) for item in (None, 0.005))
    expected, found = (costs_of(plan, tree, grounds(costs), item) for item in (hard, soft))
    assert found["heads"] == pytest.approx(expected["heads"], rel=1e-2)
    one, other = to_maps(plan, tree, hard)["units"], to_maps(plan, tree, soft)["units"]
    assert isinstance(one, HardMap)
    assert isinstance(other, SoftMap)
    assert other.write.shape == (3, 3, 3, 3)
    heads = to_maps(plan, tree, hard)["heads"]
    assert isinstance(heads, HardMap)
    for target, source in enumerate(heads.index.tolist()):
        assert torch.equal(other.write[target, source].argmax(-1), one.index[target])


def test_separate_spaces_are_separate_trees() -> None:
    plan = nested({"a": (2, ()), "b": (3, ()), "c": (2, ("a",))})
    assert [[space.name for space in tree.members] for tree in trees(plan)] == [["a", "c"], ["b"]]


# -- transports -----------------------------------------------------------------------------------


def layout_of(*axes: Axis, names: Mapping[Leaf, str]) -> ParameterLayout:
    shape = [axis.size for axis in axes]
    return lay_out("w", shape, axes, lambda leaf: names.get(leaf, ""))


def one_hot(item: HardMap, outer: HardMap | None = None) -> SoftMap:
    """Return the soft map of a hard one; below an outer space, matched outer units only hold mass."""
    size = item.index.shape[-1]
    coupling = torch.nn.functional.one_hot(item.index, size).double() / size
    if outer is None:
        return SoftMap.from_coupling(coupling, item.scope)
    count = outer.index.shape[-1]
    # What an unmatched pair of outer units would do inside does not matter.
    wide = torch.full((count, count, size, size), 1 / size**2, dtype=torch.float64)
    wide[torch.arange(count), outer.index] = coupling
    return SoftMap.from_coupling(wide, item.scope)


HEADS, UNITS, WIDTH = Leaf(3), Leaf(4), Leaf(5)
NAMES = {HEADS: "heads", UNITS: "units", WIDTH: "width"}


def maps_of(seed: int) -> dict[str, HardMap]:
    return {
        "heads": HardMap((), permutation(3, seed=seed)),
        "units": HardMap(("heads",), permutation(3, 4, seed=seed + 1)),
        "width": HardMap((), permutation(5, seed=seed + 2)),
    }


def soft(maps: Mapping[str, HardMap]) -> dict[str, SoftMap]:
    return {name: one_hot(item, maps["heads"] if item.scope else None) for name, item in maps.items()}


AXES: dict[str, tuple[Axis, ...]] = {
    "no scope": (WIDTH, Leaf(2)),
    "same axis": (WIDTH, product([HEADS, UNITS])),
    "across axes": (WIDTH, HEADS, UNITS),
    "across axes, inner first": (UNITS, HEADS),
    "beside fixed stretches": (product([HEADS, Leaf(2), UNITS]), WIDTH),
    "concatenated": (concatenation([product([HEADS, UNITS]), WIDTH]), WIDTH),
    "twice": (product([HEADS, UNITS]), product([HEADS, UNITS])),
    "grouped convolution": (product([HEADS, Leaf(2)]), UNITS, Leaf(1)),
}


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("reading", [False, True])
def test_soft_transport_of_one_hot_couplings_is_the_hard_one(name: str, reading: bool) -> None:
    axes, maps = AXES[name], maps_of(2)
    layout = layout_of(*axes, names=NAMES)
    tensor = random(*layout.shape, seed=23)
    hard = transport_tensor(tensor, layout, maps)
    side = frozenset(range(len(axes))) if reading else frozenset[int]()
    assert torch.allclose(transport_tensor(tensor, layout, soft(maps), side), hard, atol=1e-12)
    assert not torch.equal(hard, tensor)


def test_soft_transport_below_a_fixed_space_is_the_hard_one() -> None:
    experts, units = Leaf(3), Leaf(4)
    layout = layout_of(experts, WIDTH, units, names={experts: "experts", units: "units", WIDTH: "width"})
    hard = HardMap(("experts",), permutation(3, 4, seed=6))
    coupling = torch.diag_embed(torch.nn.functional.one_hot(hard.index, 4).double().movedim(0, -1))
    tensor = random(3, 5, 4)
    found = transport_tensor(
        tensor, layout, {"units": SoftMap.from_coupling(coupling.movedim((-2, -1), (0, 1)), ("experts",))}
    )
    assert torch.allclose(found, transport_tensor(tensor, layout, {"units": hard}), atol=1e-12)


def test_hard_transport_is_indexing() -> None:
    maps, tensor = maps_of(5), random(5, 12, seed=1)
    layout = layout_of(WIDTH, product([HEADS, UNITS]), names=NAMES)
    moved = transport_tensor(tensor, layout, maps).reshape(5, 3, 4)
    view = tensor.reshape(5, 3, 4)
    heads, units, width = (maps[name].index for name in ("heads", "units", "width"))
    for w, h, u in itertools.product(range(5), range(3), range(4)):
        assert moved[w, h, u] == view[width[w], heads[h], units[h, u]]


def test_grouped_weight_is_read_by_the_group_of_its_rows() -> None:
    groups, outputs, inputs = Leaf(2), Leaf(3), Leaf(4)
    names = {groups: "groups", outputs: "outputs", inputs: "inputs"}
    layout = layout_of(product([groups, outputs]), inputs, names=names)
    maps = {
        "groups": HardMap((), torch.tensor([1, 0])),
        "outputs": HardMap(("groups",), permutation(2, 3, seed=1)),
        "inputs": HardMap(("groups",), permutation(2, 4, seed=2)),
    }
    weight = random(6, 4, seed=3)
    moved, view = transport_tensor(weight, layout, maps).reshape(2, 3, 4), weight.reshape(2, 3, 4)
    for g, o, i in itertools.product(range(2), range(3), range(4)):
        source = maps["groups"].index[g], maps["outputs"].index[g, o], maps["inputs"].index[g, i]
        assert moved[g, o, i] == view[source]


def test_hard_transports_compose_with_their_inverse() -> None:
    index = permutation(5, seed=8)
    layout = layout_of(WIDTH, names=NAMES)
    tensor = random(5)
    there = transport_tensor(tensor, layout, {"width": HardMap((), index)})
    back = transport_tensor(there, layout, {"width": HardMap((), index.argsort())})
    assert torch.equal(back, tensor)


def test_a_tensor_without_mapped_spaces_is_itself() -> None:
    tensor = random(5)
    assert transport_tensor(tensor, layout_of(WIDTH, names=NAMES), {}) is tensor


def test_source_is_not_written_and_strides_do_not_matter() -> None:
    layout, maps = layout_of(WIDTH, product([HEADS, UNITS]), names=NAMES), maps_of(3)
    tensor = random(12, 5).T
    before = tensor.clone()
    assert torch.equal(
        transport_tensor(tensor, layout, maps), transport_tensor(before.contiguous(), layout, maps)
    )
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    layout, maps = layout_of(WIDTH, names=NAMES), maps_of(3)
    tensor = random(5).to(dtype)
    for given_maps in ({"width": maps["width"]}, {"width": one_hot(maps["width"])}):
        assert transport_tensor(tensor, layout, given_maps).dtype is dtype


@FAST
@given(st.integers(1, 5), st.integers(1, 5), SEED)
def test_projections_of_a_coupling_of_unequal_sizes(target: int, source: int, seed: int) -> None:
    coupling = random(target, source, seed=seed) + 0.01
    item = SoftMap.from_coupling(coupling / coupling.sum())
    assert torch.allclose(item.write.sum(-1), torch.ones(target, dtype=torch.float64))
    assert torch.allclose(item.read.sum(-2), torch.ones(source, dtype=torch.float64))
    # Mass is conserved: what the source units gave arrives, however many target units there are.
    given_mass = random(source, seed=seed + 1)
    assert float((item.read @ given_mass).sum()) == pytest.approx(float(given_mass.sum()))
    # An average of equal things is that thing.
    assert torch.allclose(
        item.write @ torch.full((source,), 2.5, dtype=torch.float64), torch.tensor(2.5).double()
    )


def test_a_unit_split_in_two_keeps_the_function() -> None:
    # Two target units take one source unit each half of what it gives: writers copy, readers halve.
    coupling = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    item = SoftMap.from_coupling(coupling)
    first, second, x = random(2, 3, seed=1), random(4, 2, seed=2), random(3, seed=3)
    expected = second @ torch.relu(first @ x)
    assert torch.allclose((second @ item.read.T) @ torch.relu(item.write @ first @ x), expected)


def test_rows_without_mass_stay_finite() -> None:
    item = SoftMap.from_coupling(torch.zeros(2, 3))
    assert torch.equal(item.write, torch.zeros(2, 3))


def test_moved_fraction() -> None:
    assert HardMap((), torch.tensor([0, 2, 1, 3])).moved == 0.5
    assert one_hot(HardMap((), torch.tensor([0, 2, 1, 3]))).moved == pytest.approx(0.5)
    identity_below = HardMap(("heads",), torch.arange(4).expand(3, 4))
    heads = HardMap((), torch.arange(3))
    assert one_hot(identity_below, heads).moved == pytest.approx(0.0)
    assert math.isclose(
        one_hot(HardMap(("heads",), torch.tensor([[1, 0], [0, 1]])), HardMap((), torch.arange(2))).moved, 0.5
    )
