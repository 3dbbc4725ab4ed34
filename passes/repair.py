"""Repair: re-estimate the batch-normalisation statistics of the merged network.

Averaged weights produce activations whose mean and variance are not the average of the parents'. The
merged network and the aligned parents run side by side on calibration data, and each stored statistic is
corrected by the measured difference::

    mean = mean_stored + (mean_merged - mean_parents)
    variance = variance_stored * variance_merged / variance_parents

so that sampling noise, which both sides share, cancels: identical parents keep their statistics exactly.
After Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import write
from fxfusion.progress import Progress, silent
from fxfusion.repair import Source, corrected_statistics
from fxfusion.state import FusionState, state_of
from fxfusion.transport.flow import carried


@dataclasses.dataclass(eq=False)
class Repair(FusionPass):
    """Re-estimate batch-normalisation statistics.

    Parameters
    ----------
    batches : Batches, optional
        Calibration data; without it nothing changes.
    progress : callable, optional
    """

    batches: Batches | None = None
    progress: Progress = silent

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are merged."""
        state_of(graph_module, "merged", "Merge")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; statistics buffers are replaced."""
        state = state_of(graph_module)
        if self.batches is None:
            return PassResult(graph_module, False)
        sources = [self._source(state, index) for index in range(len(state.parents))]
        corrected = corrected_statistics(
            state.capture, state.merged, sources, state.weights, self.batches, self.progress
        )
        state.merged.update(corrected)
        write(graph_module, corrected, state.capture.aliases)
        return PassResult(graph_module, bool(corrected))

    @staticmethod
    def _source(state: FusionState, index: int) -> Source:
        """Return how a parent is measured: aligned, or as it is if its widths differ."""
        parent, alignment = state.parents[index], state.alignments[index]
        if alignment is None or parent.capture is state.capture:
            return Source(state.capture, state.aligned[index])

        def carry(name: str, values: torch.Tensor) -> torch.Tensor:
            alone = dataclasses.replace(parent.plan, layouts={name: parent.plan.layouts[name]})
            return carried(alone, alignment, {name: values})[name]

        return Source(parent.capture, parent.state, carry)
