"""FoldNorms: move norm weights into what reads the normalised tensors, so that spaces may turn."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.errors import OptionError
from fxfusion.folding import can_fold, fold_norms
from fxfusion.groups import enlarge
from fxfusion.passes.base import FusionPass
from fxfusion.state import state_of


@dataclasses.dataclass(eq=False)
class FoldNorms(FusionPass):
    """Give every space its largest known group, and every parent the weights on which it may act.

    The parents compute what they did; their own tensors are not written.
    """

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are paired, and of equal widths."""
        state = state_of(graph_module, "parents", "Pair")
        if any(parent.plan is not state.plan for parent in state.parents):
            raise OptionError("rotations are for parents of equal widths: leave symmetry out")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        assert state.plan is not None
        states = [parent.state for parent in state.parents]
        plan = enlarge(
            state.capture, state.plan, lambda fold: all(can_fold(fold, weights) for weights in states)
        )
        state.plan = plan
        state.parents = [
            dataclasses.replace(parent, plan=plan, state=fold_norms(plan, parent.state))
            for parent in state.parents
        ]
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every norm weight that could be folded is one, in every parent."""
        state = state_of(graph_module, "plan", "Propagate")
        assert state.plan is not None
        for parent in state.parents:
            assert all(bool((parent.state[fold.weight] == 1).all()) for fold in state.plan.folds)
