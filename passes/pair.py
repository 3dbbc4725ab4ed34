"""Pair: find the parents' units again in the target's spaces, whatever their widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.pairing import Parent, pair
from fxfusion.passes.base import FusionPass
from fxfusion.state import FusionState, state_of


@dataclasses.dataclass(eq=False)
class Pair(FusionPass):
    """Bind the parents to the target's graph.

    Parameters
    ----------
    parents : sequence of dict
        State dicts of all parents, the target among them.
    target : int
        Position of the parent in whose basis the others are expressed.
    others : mapping of int to torch.fx.GraphModule, optional
        By position, parents of other widths than the target: prepared, and planned by ``Propagate``.
    """

    parents: Sequence[Mapping[str, torch.Tensor]]
    target: int = -1
    others: Mapping[int, GraphModule] = dataclasses.field(default_factory=dict)

    def requires(self, graph_module: GraphModule) -> None:
        """There is a plan, and one for every parent of other widths."""
        for module in (graph_module, *self.others.values()):
            state_of(module, "plan", "Propagate")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        state.target = range(len(self.parents))[self.target]
        state.parents = [self._parent(state, index) for index in range(len(self.parents))]
        return PassResult(graph_module, False)

    def _parent(self, state: FusionState, index: int) -> Parent:
        assert state.plan is not None
        if index not in self.others:
            return Parent(state.capture, state.plan, state.capture.canonical(self.parents[index]))
        other = state_of(self.others[index])
        assert other.plan is not None
        names = tuple(
            f"model {place} ({item.capture.name})" for place, item in ((state.target, state), (index, other))
        )
        plan = pair(state.capture, state.plan, other.capture, other.plan, (names[0], names[1]))
        return Parent(other.capture, plan, other.capture.canonical(self.parents[index]))

    def ensures(self, graph_module: GraphModule) -> None:
        """Every parent is bound."""
        assert len(state_of(graph_module, "parents", "Pair").parents) == len(self.parents)
