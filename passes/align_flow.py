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
from fxfusion.transport.magnitudes import Magnitude, magnitudes
from fxfusion.transport.options import Flow, Heads, Observe, check_data


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
    weighed : Batches, optional
        Calibration data by which skip and branch are weighed; ``batches`` by default.
    """

    options: Flow = dataclasses.field(default_factory=Flow)
    batches: Batches | None = None
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    observed: Observe = dataclasses.field(default_factory=Observe)
    progress: Progress = silent
    weighed: Batches | None = None

    def __post_init__(self) -> None:
        if self.weighed is None:
            self.weighed = self.batches

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are paired, and there are calibration data for options that need them."""
        state_of(graph_module, "parents", "Pair")
        check_data(self.options, self.weighed is not None, self.batches is not None)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        assert state.plan is not None
        carried = carry(state.capture, state.plan, self.options)
        moments = self._moments(state, carried)
        weights = self._magnitudes(state, carried)
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
                    weights,
                )
            )
        return PassResult(graph_module, False)

    def _magnitudes(self, state: FusionState, carried: Carried) -> Magnitude:
        """Return how large the target's skips and branches are, if that is needed."""
        if not self.options.weighted:
            return {}
        assert self.weighed is not None
        return magnitudes(state.parents[state.target], carried, self.weighed, self.options, self.observed)

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
