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

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import write
from fxfusion.progress import Progress, silent
from fxfusion.repair import corrected_statistics, weighted_statistics
from fxfusion.state import state_of


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
        # Parents of other widths no longer compute what their own statistics were taken from.
        kept = [index for index, parent in enumerate(state.parents) if parent.capture is state.capture]
        parents = [state.aligned[index] for index in kept]
        total = sum(state.weights[index] for index in kept)
        shares = [state.weights[index] / total if total else 1.0 / len(kept) for index in kept]
        stored = state.merged
        if len(kept) < len(state.parents):
            stored = {**stored, **weighted_statistics(state.capture, parents, shares)}
        corrected = corrected_statistics(state.capture, stored, parents, shares, self.batches, self.progress)
        state.merged.update(corrected)
        write(graph_module, corrected, state.capture.aliases)
        return PassResult(graph_module, bool(corrected))
