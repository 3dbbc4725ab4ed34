"""Refine: learn, on calibration data, transports by which the average says what the parents say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.agreement import Lessons
from fxfusion.calibration import Batches
from fxfusion.passes.base import FusionPass
from fxfusion.progress import Progress, silent
from fxfusion.state import state_of
from fxfusion.symmetry import act
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.learned import Refinement, refine


@dataclasses.dataclass(eq=False)
class Refine(FusionPass):
    """Refine the aligned parents within their symmetry groups.

    Parameters
    ----------
    batches : Batches
        Calibration data.
    options : Refinement
    weights : sequence of float, optional
        The parents' shares, summing to one; equal by default.
    seed : int
    renormalised : bool
        Whether ``Repair`` will correct batch normalisations.
    coupling : Coupling
        Of which spaces the learned transports are soft.
    progress : callable, optional
    """

    batches: Batches
    options: Refinement = dataclasses.field(default_factory=Refinement)
    weights: Sequence[float] | None = None
    seed: int = 0
    renormalised: bool = True
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    progress: Progress = silent

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are in the target's basis."""
        state_of(graph_module, "aligned", "ApplyTransports")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph itself stays as it is."""
        state = state_of(graph_module)
        assert state.plan is not None
        weights = self.weights or (1.0 / len(state.parents),) * len(state.parents)
        lessons = Lessons(
            state.capture,
            state.taught_by,
            state.outputs,
            weights,
            self.batches,
            labels=self.options.labels,
        )
        state.refined = refine(
            state.plan,
            state.capture,
            state.aligned,
            state.target,
            weights,
            lessons,
            self.options,
            self.seed,
            self.renormalised,
            self.coupling,
            self.progress,
        )
        state.aligned = [
            aligned if maps is None else act(state.plan, maps, aligned)
            for aligned, maps in zip(state.aligned, state.refined.maps, strict=True)
        ]
        return PassResult(graph_module, False)

    def ensures(self, graph_module: GraphModule) -> None:
        """Refinement did not lead away from the parents."""
        state = state_of(graph_module, "refined", "Refine")
        assert state.refined is not None
        assert state.refined.after <= state.refined.before
