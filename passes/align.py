"""Align: solve, for every space and every parent, the transport into the target's basis."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.passes.base import FusionPass
from fxfusion.progress import Progress, silent
from fxfusion.state import state_of
from fxfusion.statistics import collect
from fxfusion.transport.barycenter import align_together
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.joint import align
from fxfusion.transport.options import Observe


@dataclasses.dataclass(eq=False)
class Align(FusionPass):
    """Solve the transports.

    Parameters
    ----------
    batches : Batches, optional
        Calibration data; without it, weights alone are compared.
    coupling : Coupling
        Hard or soft.
    observed : Observe
        Which calibration activations count.
    progress : callable, optional
    rounds : int
        With three parents or more: how often each is aligned with the average of the others at most.
    """

    batches: Batches | None = None
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    observed: Observe = dataclasses.field(default_factory=Observe)
    progress: Progress = silent
    rounds: int = 0

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are paired."""
        state_of(graph_module, "parents", "Pair")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        moments = None
        if self.batches is not None:
            moments = collect(
                state.parents,
                state.target,
                self.batches,
                len(self.batches),
                self.progress,
                observed=self.observed,
            )
        state.alignments = [
            None
            if index == state.target
            else align(
                parent.plan,
                state.parents[state.target].state,
                parent.state,
                self.coupling,
                moments[index] if moments else None,
                self.progress,
            )
            for index, parent in enumerate(state.parents)
        ]
        if self.rounds and len(state.parents) > 2:
            state.alignments = align_together(
                state.parents,
                state.alignments,
                state.target,
                self.coupling,
                moments,
                self.rounds,
                self.progress,
            )
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every parent but the target has its transports."""
        state = state_of(graph_module, "alignments", "Align")
        assert all((item is None) == (index == state.target) for index, item in enumerate(state.alignments))
