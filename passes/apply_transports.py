"""ApplyTransports: carry each parent's transports through all its parameters and statistics."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.passes.base import FusionPass
from fxfusion.state import state_of
from fxfusion.symmetry import fill
from fxfusion.transport.flow import carried


@dataclasses.dataclass(eq=False)
class ApplyTransports(FusionPass):
    """Express every parent in the target's basis. The parents' own tensors are not written."""

    def requires(self, graph_module: GraphModule) -> None:
        """The transports are solved."""
        state_of(graph_module, "alignments", "Align")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        own = state.parents[state.target].state
        state.aligned = []
        for parent, alignment in zip(state.parents, state.alignments, strict=True):
            if alignment is None:
                state.aligned.append(dict(parent.state))
                continue
            moved = carried(parent.plan, alignment, parent.state)
            state.aligned.append(fill(parent.plan, alignment.maps, moved, own))
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every aligned parent has the target's shapes."""
        state = state_of(graph_module, "aligned", "ApplyTransports")
        for aligned in state.aligned:
            assert {name: tuple(tensor.shape) for name, tensor in aligned.items()} == state.capture.parameters
