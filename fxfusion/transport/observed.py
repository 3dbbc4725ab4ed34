"""Costs of activations by space: from moments that are all there, or added up as these come, in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fxfusion.devices import device_of
from fxfusion.plan import Plan, Space
from fxfusion.statistics import CrossMoments
from fxfusion.transport.cost import activation_cost, observed_cost
from fxfusion.transport.hierarchy import Ground, Shape, Tree, trees


def observed_costs(plan: Plan, moments: Mapping[str, Sequence[CrossMoments]]) -> dict[str, Ground]:
    """Return the costs of all trees of spaces that were observed, by space.

    Parameters
    ----------
    plan : Plan
    moments : mapping of str to sequence of CrossMoments
        By space, one per observation; empty for no observations at all.
    """
    if not moments:
        return {}
    spaces = _seen(plan, {name: len(items) for name, items in moments.items()})
    device = device_of(item.cross for items in moments.values() for item in items)
    return {space.name: activation_cost(plan, space, moments[space.name], device) for space in spaces}


class StoredCosts(Mapping[str, Ground]):
    """Costs of activations by space, in files once they are complete.

    Parameters
    ----------
    plan : Plan
    places : mapping of str to int
        At how many places each space is observed.
    directory : Path
        An existing one.

    Examples
    --------
    >>> import fxfusion, tempfile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> plan = fxfusion.plan(model, (torch.ones(2, 4),))
    >>> (space,) = plan.spaces
    >>> costs = StoredCosts(plan, {space.name: 1}, Path(tempfile.mkdtemp()))
    >>> moments = CrossMoments(1, 8, 8)
    >>> moments.update(torch.randn(1, 8, 50), torch.randn(1, 8, 50))
    >>> costs.add(space.name, moments)
    >>> costs[space.name].matrix.shape
    torch.Size([1, 1, 1, 8, 8])
    """

    def __init__(self, plan: Plan, places: Mapping[str, int], directory: Path) -> None:
        self._plan = plan
        self._places = dict(places)
        self._missing = dict(places)
        self._open: dict[str, Ground] = {}
        self._spaces = {space.name: space for space in _seen(plan, places)}
        self._files = {name: directory / f"cost-{index}" for index, name in enumerate(self._spaces)}

    def add(self, name: str, moments: CrossMoments) -> None:
        """Add what was observed of a space at one place."""
        if name not in self._spaces:
            return
        space = self._spaces[name]
        cost = observed_cost(moments, space, Shape.of(self._plan, space))
        known = self._open.pop(name, None)
        cost = cost if known is None else known + cost
        self._missing[name] -= 1
        if self._missing[name]:
            self._open[name] = cost
            return
        cost = cost * (1.0 / self._places[name])
        save_file(
            {"matrix": cost.matrix.contiguous(), "offset": torch.as_tensor(cost.offset).contiguous()},
            self._files[name],
        )

    def __getitem__(self, name: str) -> Ground:
        """Read the cost of a space; none of its own if only spaces below it were observed."""
        space = self._spaces[name]
        if not self._places[name]:
            return Ground.zeros(Shape.of(self._plan, space))
        stored = load_file(self._files[name])
        return Ground(stored["matrix"], stored["offset"])

    def __iter__(self) -> Iterator[str]:
        """Yield the names of spaces."""
        return iter(self._spaces)

    def __len__(self) -> int:
        return len(self._spaces)

    def __contains__(self, name: object) -> bool:
        return name in self._spaces


def _seen(plan: Plan, places: Mapping[str, int]) -> list[Space]:
    """Return the spaces of trees in which every space, or a space below it, was observed."""
    return [space for tree in trees(plan) if _is_seen(tree, places) for space in tree.members]


def _is_seen(tree: Tree, places: Mapping[str, int]) -> bool:
    return all(
        places[space.name] or any(places[below.name] for below in tree.members if space.name in below.scope)
        for space in tree.members
    )
