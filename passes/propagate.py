"""Propagate: infer which space every axis of every tensor lives in, and attach the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.passes.base import FusionPass
from fxfusion.planning import make_plan
from fxfusion.state import state_of


@dataclasses.dataclass(eq=False)
class Propagate(FusionPass):
    """Infer the plan.

    Parameters
    ----------
    outputs : sequence of str, optional
        Names of the outputs that must be kept; by default all but hidden states, attentions and caches.
    """

    outputs: Sequence[str] | None = None

    def requires(self, graph_module: GraphModule) -> None:
        """The module was captured by fxfusion."""
        state_of(graph_module)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        state.outputs = state.capture.select_outputs(self.outputs)
        state.plan = make_plan(state.capture, state.outputs)
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """There is a plan."""
        state_of(graph_module, "plan", "Propagate")
