"""Restore: give the aligned parents the target's own factors of units and bases of heads."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.balance import unbalanced
from fxfusion.passes.base import FusionPass
from fxfusion.state import state_of


@dataclasses.dataclass(eq=False)
class Restore(FusionPass):
    """Take back from all parents what ``Balance`` did to the target.

    Equal factors commute with averages, so that the fused network computes the same with and without; with
    it, the target is itself in its own basis, and layers that took no part go with those that did.
    """

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are in the target's basis."""
        state_of(graph_module, "aligned", "ApplyTransports")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        if state.factors:
            assert state.plan is not None
            plan, factors = state.plan, state.factors
            state.aligned = [unbalanced(plan, weights, factors) for weights in state.aligned]
            state.factors = ()
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """There is nothing left to take back."""
        assert not state_of(graph_module).factors
