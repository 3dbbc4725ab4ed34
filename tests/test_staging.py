"""Calibration in stages: the same moments, with a part of the weights in memory and batches in files."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfusion.capture import capture
from fxfusion.errors import MemoryLimitError
from fxfusion.execution import Live
from fxfusion.pairing import Parent
from fxfusion.staging import MemoryLimit, Shelf, stages, used
from fxfusion.statistics import CrossMoments, collect, gather
from fxfusion.transport.observed import StoredCosts, observed_costs
from tests import zoo

LEAST = {"group_norm": 3_755, "hf_vit": 965_291, "gpt2": 3_328_683, "llama": 961_195, "t5": 961_195}  # bytes


class Watched(Mapping[str, torch.Tensor]):
    """Weights of which a copy is handed out at every access, and counted while it lives."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = weights
        self.reads: dict[str, int] = {}
        self.held = self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.weights[name].clone()
        self.reads[name] = self.reads.get(name, 0) + 1
        self.held += found.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(found, self._let_go, found.nbytes)
        return found

    def _let_go(self, size: int) -> None:
        self.held -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def parents(name: str, seeds: tuple[int, ...] = (0, 1, 2)) -> tuple[list[Parent], list[Watched]]:
    """Return parents of one class whose weights are watched."""
    known = zoo.planned(name)
    assert known.plan is not None
    states = [Watched(zoo.build(name, seed).state_dict()) for seed in seeds]
    return [Parent(known.capture, known.plan, state) for state in states], states


def batches(name: str, count: int = 3) -> list[tuple[zoo.Args, zoo.Kwargs]]:
    return [zoo.inputs(name, 4, seed) for seed in range(count)]


@pytest.mark.parametrize("name", LEAST)
def test_the_same_moments(name: str, tmp_path: Path) -> None:
    items, states = parents(name)
    expected = collect(items, 0, batches(name))
    limit = MemoryLimit(LEAST[name], tmp_path)
    with pytest.raises(MemoryLimitError, match="raise it"):
        next(gather(items, 0, [], limit=MemoryLimit(LEAST[name] - 2, tmp_path)))
    for state in states:
        state.reads.clear()
        state.most = 0
    found: list[dict[tuple[str, int], CrossMoments]] = [{} for _ in items]
    parts = 0
    for part in gather(items, 0, batches(name), limit=limit):
        parts += 1
        for whole, gathered in zip(found, part, strict=True):
            assert not whole.keys() & gathered.keys()
            whole.update(gathered)
        assert sum(state.held for state in states) == 0  # let go before the next stage
    assert parts > 2
    assert not found[0]
    for whole, moments in zip(found[1:], expected[1:], strict=True):
        assert len(whole) == sum(map(len, moments.values()))
        for (space, number), item in whole.items():
            other = moments[space][number]
            assert item.count == other.count
            assert torch.equal(item.cross, other.cross)
            assert torch.equal(item.mean_source, other.mean_source)
            assert torch.equal(item.square_target, other.square_target)
    assert sum(state.most for state in states) <= limit.stage
    assert sum(state.most for state in states) < sum(
        tensor.nbytes for state in states for tensor in state.weights.values()
    )
    # Each is asked for its size, and read once more; tied weights belong to two stages.
    twice = [name for name, times in states[1].reads.items() if times == 2]
    assert len(twice) >= len(states[1].reads) - 1
    assert not list(tmp_path.iterdir())


def test_a_limit_below_the_largest_layer_is_refused_before_anything_runs(tmp_path: Path) -> None:
    items, _ = parents("hf_vit")

    def never() -> Iterator[tuple[zoo.Args, zoo.Kwargs]]:
        raise AssertionError("batches were asked for")
        yield

    with pytest.raises(MemoryLimitError, match=r"alone takes 0\.\d MB for the parents' weights and stat"):
        next(gather(items, 0, never(), limit=MemoryLimit(1000, tmp_path)))


def test_stages_follow_one_another_and_end_where_little_is_alive() -> None:
    """Each block widens 16 times and narrows again: a cut within costs 16 times as much."""
    blocks = [nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(6)]
    found = capture(nn.Sequential(*blocks), (torch.ones(2, 4),))
    weights = dict.fromkeys(found.parameters, 100)
    nodes = list(found.module.graph.nodes)
    cuts = stages(found, weights, {}, 900)
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert cuts[-1].stop == len(nodes)
    assert len(cuts) == 3
    for cut in cuts:
        assert sum(weights[name] for name in used(found, nodes[cut])) <= 900
        value = nodes[cut][-1].meta.get("val")
        assert value is None or value.shape[-1] == 4


def test_what_is_gathered_counts() -> None:
    found = capture(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), (torch.ones(2, 4),))
    weights = dict.fromkeys(found.parameters, 1)
    linear = [node.name for node in found.module.graph.nodes if node.op == "call_function"]
    assert len(stages(found, weights, {}, 20)) == 1
    assert len(stages(found, weights, dict.fromkeys(linear, 10), 20)) == 4


@pytest.mark.parametrize("limit", [0, 10**6])
def test_a_shelf_returns_what_it_was_given(limit: int, tmp_path: Path) -> None:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "abcdef"]
    whole = torch.randn(4, 6)
    shared = {nodes[0]: whole[:, 2:3], nodes[1]: 7, nodes[2]: (whole.bfloat16(), None)}
    own = ({nodes[3]: whole > 0}, {nodes[4]: torch.tensor(2.5), nodes[5]: torch.zeros(0, 3)})
    shelf = Shelf(tmp_path, limit)
    shelf.put(5, [Live(dict(shared), own), Live({nodes[0]: whole.t(), nodes[1]: whole.t()}, ())])
    assert bool(list(tmp_path.iterdir())) == (limit == 0)
    first, second = shelf.take(5)
    assert not list(tmp_path.iterdir())
    assert torch.equal(first.shared[nodes[0]], whole[:, 2:3])
    assert first.shared[nodes[1]] == 7
    assert torch.equal(first.shared[nodes[2]][0], whole.bfloat16())
    assert first.shared[nodes[2]][1] is None
    assert torch.equal(first.own[0][nodes[3]], whole > 0)
    assert torch.equal(first.own[1][nodes[4]], torch.tensor(2.5))
    assert first.own[1][nodes[5]].shape == (0, 3)
    assert torch.equal(second.shared[nodes[1]], whole.t())
    assert second.shared[nodes[1]].stride() == (1, 6)


@pytest.mark.parametrize("name", ["llama", "hf_vit"])
def test_costs_in_files_are_those_of_all_moments(name: str, tmp_path: Path) -> None:
    items, _ = parents(name, (0, 1))
    moments = collect(items, 0, batches(name))[1]
    expected = observed_costs(items[0].plan, moments)
    stored = StoredCosts(items[0].plan, {space: len(some) for space, some in moments.items()}, tmp_path)
    for space, some in moments.items():
        for item in some:
            stored.add(space, item)
    assert set(stored) == set(expected)
    assert set(expected)
    for space, cost in expected.items():
        assert torch.equal(stored[space].matrix, cost.matrix)
        assert torch.equal(torch.as_tensor(stored[space].offset), torch.as_tensor(cost.offset))
