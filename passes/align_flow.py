"""AlignFlow: solve transports layer by layer along the network, as the paper does."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.passes.base import FusionPass
from fxfusion.progress import Progress, silent
from fxfusion.state import FusionState, state_of
from fxfusion.statistics import CrossMoments, collect
from fxfusion.transport.carry import Carried, Streams, carry
from fxfusion.transport.flow import Moments, flow_observations, solve_flow
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.options import Flow, Heads, Observe, check_uncalibrated


@dataclasses.dataclass(eq=False)
class AlignFlow(FusionPass):
    """Solve the transports of every layer, given those carried into it.

    Parameters
    ----------
    options : Flow
    batches : Batches, optional
        Calibration data; without it, weights are compared.
    coupling : Coupling
        Hard or soft.
    observed : Observe
        Which calibration activations count.
    progress : callable, optional
    """

    options: Flow = dataclasses.field(default_factory=Flow)
    batches: Batches | None = None
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    observed: Observe = dataclasses.field(default_factory=Observe)
    progress: Progress = silent

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are paired, and there are calibration data for options that need them."""
        state_of(graph_module, "parents", "Pair")
        if self.batches is None:
            check_uncalibrated(self.options)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        assert state.plan is not None
        carried = carry(state.capture, state.plan, self.options)
        moments = self._moments(state, carried)
        state.alignments = []
        for index, parent in enumerate(state.parents):
            self.progress("match", index, len(state.parents))
            state.alignments.append(
                None
                if index == state.target
                else solve_flow(
                    parent.plan,
                    carried,
                    state.parents[state.target].state,
                    parent.state,
                    self.options,
                    self.coupling,
                    moments[index] if moments else None,
                )
            )
        return PassResult(graph_module, False)

    def _moments(self, state: FusionState, carried: Carried) -> list[Moments]:
        """Return every parent's moments with the target, by node and space."""
        if self.batches is None:
            return []
        assert state.plan is not None
        assert isinstance(self.options.heads, Heads)
        streams = Streams(state.plan, self.options.heads)
        places = flow_observations(
            state.plan,
            carried,
            streams,
            state.capture.module.graph,
            self.options.weighted,
        )
        collected = collect(
            state.parents,
            state.target,
            self.batches,
            len(self.batches),
            self.progress,
            places,
            self.observed,
            own=self.options.costs.components is not None,
        )
        found: list[Moments] = []
        for streamed in collected:
            by_node: dict[tuple[str, str], list[CrossMoments]] = {}
            for space, items in streamed.items():
                for place, item in zip(places[space], items, strict=True):
                    by_node.setdefault((place.node, space), []).append(item)
            found.append(by_node)
        return found

    def ensures(self, graph_module: GraphModule) -> None:
        """Every parent but the target has its transports."""
        state = state_of(graph_module, "alignments", "AlignFlow")
        assert all((item is None) == (index == state.target) for index, item in enumerate(state.alignments))
