"""Balance: give every parent the weights of the least sum of squares that compute the same."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.balance import balanced
from fxfusion.passes.base import FusionPass
from fxfusion.state import state_of


@dataclasses.dataclass(eq=False)
class Balance(FusionPass):
    """Choose units' factors, and head dimensions' bases, alike in every parent.

    The target's factors are kept, for ``Restore`` to take back.

    The parents compute what they did; their own tensors are not written.
    """

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are paired."""
        state_of(graph_module, "parents", "Pair")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        found = [balanced(parent.plan, parent.state) for parent in state.parents]
        state.parents = [
            dataclasses.replace(parent, state=weights)
            for parent, (weights, _) in zip(state.parents, found, strict=True)
        ]
        state.factors = found[state.target][1]
        return PassResult(graph_module, False)
