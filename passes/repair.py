"""Repair: give the merged network statistics like its parents'.

Averaged weights produce activations whose mean and variance are not the average of the parents'. The
merged network and the aligned parents run side by side on calibration data, and each stored statistic is
corrected by the measured difference::

    mean = mean_stored + (mean_merged - mean_parents)
    variance = variance_stored * variance_merged / variance_parents

so that sampling noise, which both sides share, cancels: identical parents keep their statistics exactly.
Of layers with a bias, every unit can be brought to the parents' average mean and deviation, too; or layers
can be fitted to what the parents' layers give on average (:mod:`fxfusion.regression`).
After Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.errors import OptionError
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import write
from fxfusion.progress import Progress, silent
from fxfusion.regression import fitted_layers
from fxfusion.repair import Source, corrected_statistics, rescaled_units
from fxfusion.state import FusionState, state_of
from fxfusion.symmetry import act
from fxfusion.transport.flow import carried


@dataclasses.dataclass(eq=False)
class Repair(FusionPass):
    """Correct statistics.

    Parameters
    ----------
    batches : Batches, optional
        Calibration data; without it nothing changes.
    progress : callable, optional
    units : bool
        Whether layers with a bias are corrected, too, not batch normalisations alone.
    layers : bool
        Whether layers are fitted to the parents, with batch normalisations between them, in place of both.
    """

    batches: Batches | None = None
    progress: Progress = silent
    units: bool = False
    layers: bool = False

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are merged, and of equal widths if units or layers are to be corrected."""
        state = state_of(graph_module, "merged", "Merge")
        alike = all(parent.capture is state.capture for parent in state.parents)
        if (self.units or self.layers) and not alike:
            name = "units" if self.units else "layers"
            raise OptionError(f'repair="{name}" is for parents of equal widths: leave it out')

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; statistics buffers, weights and biases are replaced."""
        state = state_of(graph_module)
        if self.batches is None:
            return PassResult(graph_module, False)
        if self.layers:
            fitted = fitted_layers(
                state.capture, state.merged, state.aligned, state.weights, self.batches, self.progress
            )
            state.merged.update(fitted)
            write(graph_module, fitted, state.capture.aliases)
            return PassResult(graph_module, bool(fitted))
        sources = [self._source(state, index) for index in range(len(state.parents))]
        corrected = corrected_statistics(
            state.capture, state.merged, sources, state.weights, self.batches, self.progress
        )
        state.merged.update(corrected)
        if self.units:
            rescaled = rescaled_units(
                state.capture, state.merged, state.aligned, state.weights, self.batches, self.progress
            )
            state.merged.update(rescaled)
            corrected |= rescaled
        write(graph_module, corrected, state.capture.aliases)
        return PassResult(graph_module, bool(corrected))

    @staticmethod
    def _source(state: FusionState, index: int) -> Source:
        """Return how a parent is measured: aligned, or as it is if its widths differ."""
        parent, alignment = state.parents[index], state.alignments[index]
        if alignment is None or parent.capture is state.capture:
            return Source(state.capture, state.aligned[index])

        def carry(name: str, values: torch.Tensor) -> torch.Tensor:
            moved = carried(parent.plan.only([name]), alignment, {name: values})
            further = state.refined.maps[index] if state.refined is not None else None
            if further is not None:
                assert state.plan is not None
                moved = act(state.plan.only([name]), further, moved)
            return moved[name]

        return Source(parent.capture, parent.state, carry)
