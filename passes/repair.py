"""Repair: give the merged network statistics like its parents'.

Averaged weights produce activations whose mean and variance are not the average of the parents'. The
merged network and the aligned parents run side by side on calibration data, and each stored statistic is
corrected by the measured difference::

    mean = mean_stored + (mean_merged - mean_parents)
    variance = variance_stored * variance_merged / variance_parents

so that sampling noise, which both sides share, cancels: identical parents keep their statistics exactly.
Of layers with a bias, every unit can be brought to the parents' average mean and deviation, too; or layers
can be fitted to what the parents' layers give on average (:mod:`fxfusion.regression`): a parent's own layers,
if its widths differ from the target's.
After Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.calibration import Batches
from fxfusion.errors import OptionError
from fxfusion.pairing import Parent
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import write
from fxfusion.progress import Progress, silent
from fxfusion.regression import fitted_layers
from fxfusion.repair import Source, corrected_statistics, layers_of, rescaled_units
from fxfusion.state import FusionState, state_of
from fxfusion.symmetry import act, output_carrier
from fxfusion.transport.flow import carried
from fxfusion.transport.map import Maps, SoftMap


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
        """The parents are merged, and of equal widths if units are to be corrected."""
        state = state_of(graph_module, "merged", "Merge")
        if self.units and any(parent.capture is not state.capture for parent in state.parents):
            raise OptionError('repair="units" is for parents of equal widths: leave it out')

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; statistics buffers, weights and biases are replaced."""
        state = state_of(graph_module)
        if self.batches is None:
            return PassResult(graph_module, False)
        sources = [self._source(state, index) for index in range(len(state.parents))]
        if self.layers:
            fitted = fitted_layers(
                state.capture, state.merged, sources, state.weights, self.batches, self.progress
            )
            state.merged.update(fitted)
            write(graph_module, fitted, state.capture.aliases)
            return PassResult(graph_module, bool(fitted))
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

    def _source(self, state: FusionState, index: int) -> Source:
        """Return how a parent is measured: aligned, or as it is if its widths differ."""
        parent, alignment = state.parents[index], state.alignments[index]
        if alignment is None or parent.capture is state.capture:
            return Source(state.capture, state.aligned[index])
        if self.layers and (alignment.local is not None or _partial(alignment.maps)):
            return Source(state.capture, state.aligned[index])  # no one basis to carry outputs into
        further = state.refined.maps[index] if state.refined is not None else None

        def carry(name: str, values: torch.Tensor) -> torch.Tensor:
            moved = carried(parent.plan.only([name]), alignment, {name: values})
            if further is not None:
                assert state.plan is not None
                moved = act(state.plan.only([name]), further, moved)
            return moved[name]

        return Source(
            parent.capture, parent.state, carry, self._outputs(state, parent, alignment.maps, further)
        )

    def _outputs(
        self, state: FusionState, parent: Parent, maps: Maps, further: Maps | None
    ) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return what carries the output of every layer into the target's basis, by name of its node."""
        assert state.plan is not None
        found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        steps = [(parent.plan, maps)] + ([(state.plan, further)] if further is not None else [])
        for layer in layers_of(state.capture) if self.layers else ():
            ways = [output_carrier(plan, some, layer.node.name, layer.weight) for plan, some in steps]
            known = [way for way in ways if way is not None]
            if len(known) == len(steps):
                found[layer.node.name] = functools.partial(_through, known)
        return found


def _through(ways: Sequence[Callable[[torch.Tensor], torch.Tensor]], output: torch.Tensor) -> torch.Tensor:
    for way in ways:
        output = way(output)
    return output


def _partial(maps: Maps) -> bool:
    return any(isinstance(item, SoftMap) and item.partial for item in maps.values())
