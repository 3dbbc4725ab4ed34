"""Statistics of a merged network's batch normalisations, corrected by what calibration data show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.calibration import Batches
from fxfusion.capture import Capture
from fxfusion.execution import Program
from fxfusion.progress import Progress, silent
from fxfusion.rules.registry import operator_name

BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_TINY = 1e-12
_ROUNDING = 1e-4  # relative to a standard deviation or variance


@dataclasses.dataclass(eq=False)
class _Moments:
    """Mean and second central moment per channel, streamed."""

    count: int = 0
    mean: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    square: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    def update(self, x: torch.Tensor) -> None:
        """Add a batch ``[b, channels, ...]``."""
        flat = x.double().movedim(1, 0).flatten(1)
        count, mean = flat.shape[1], flat.mean(1)
        shift, total = mean - self.mean, self.count + count
        self.square = (
            self.square + flat.var(1, unbiased=False) * count + shift**2 * (self.count * count / total)
        )
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        return self.square / max(self.count, 1)


def corrected_statistics(
    capture: Capture,
    merged: Mapping[str, torch.Tensor],
    parents: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
    batches: Batches,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Return corrected running means and variances of every batch normalisation.

    Parameters
    ----------
    capture : Capture
    merged : mapping of str to torch.Tensor
        The fused weights.
    parents : sequence of mapping
        The aligned parents.
    weights : sequence of float
        Their shares.
    batches : Batches
        Calibration data.
    progress : callable, optional

    Returns
    -------
    dict of str to torch.Tensor
        By name of the buffer; empty for a network without batch normalisation.
    """
    nodes = _batch_norms(capture)
    corrected: dict[str, torch.Tensor] = {}
    if not nodes:
        return corrected
    program = Program(capture)
    # A layer's input depends on the statistics before it, so that layers settle in graph order; all
    # layers are measured in one run, each batch normalised by the statistics that it corrects itself.
    seen: dict[tuple[str, int], _Moments] = {
        (node.name, side): _Moments() for node in nodes for side in range(len(parents) + 1)
    }
    wanted = {node.name for node in nodes}

    def override(node: fx.Node, index: int, args: tuple[Any, ...]) -> Any:
        if node.name not in wanted:
            return None
        seen[node.name, index].update(args[0])
        if index < len(parents):
            return None
        mean, variance = _corrected(node.name, seen, weights, args[3], args[4])
        return node.target(*args[:3], mean, variance, *args[5:])  # type: ignore[operator]

    for done, (args, kwargs) in enumerate(batches, start=1):
        program.run([*parents, merged], args, kwargs, override=override)
        progress("repair", done, len(batches))
    for node in nodes:
        names = _buffers(capture, node)
        for name, value in zip(
            names, _corrected(node.name, seen, weights, *(merged[n] for n in names)), strict=True
        ):
            corrected[name] = value
    return corrected


def weighted_statistics(
    capture: Capture, parents: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Return the average of the parents' running means and variances.

    Parameters
    ----------
    capture : Capture
    parents : sequence of mapping
    weights : sequence of float
        Their shares, summing to one.

    Returns
    -------
    dict of str to torch.Tensor
        By name of the buffer.
    """
    names = [name for node in _batch_norms(capture) for name in _buffers(capture, node)]
    shares = torch.tensor(weights, dtype=torch.float64)
    return {
        name: torch.tensordot(shares, torch.stack([parent[name].double() for parent in parents]), 1).to(
            parents[0][name].dtype
        )
        for name in names
    }


def _batch_norms(capture: Capture) -> list[fx.Node]:
    return [
        node
        for node in capture.module.graph.nodes
        if operator_name(node.target) in BATCH_NORMS and isinstance(node.args[3], fx.Node)
    ]


def _buffers(capture: Capture, node: fx.Node) -> list[str]:
    """Return the names of a batch normalisation's running mean and variance."""
    return [capture.aliases.get(str(item.target), str(item.target)) for item in node.args[3:5]]  # type: ignore[union-attr]


def _corrected(
    node: str,
    seen: Mapping[tuple[str, int], _Moments],
    weights: Sequence[float],
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    own = seen[node, len(weights)]
    parents = [seen[node, index] for index in range(len(weights))]
    shares = torch.tensor(weights, dtype=torch.float64)
    expected_mean = shares @ torch.stack([item.mean for item in parents])
    expected = shares @ torch.stack([item.variance for item in parents])
    ratio = torch.where(expected > _TINY, own.variance / (expected + _TINY), torch.ones(()))
    shift = own.mean - expected_mean
    # Float32 activations carry rounding: what is no larger is no difference, and stays uncorrected.
    ratio = torch.where((ratio - 1.0).abs() > _ROUNDING, ratio, torch.ones(()))
    shift = torch.where(shift.abs() > _ROUNDING * expected.sqrt(), shift, torch.zeros(()))
    return (mean.double() + shift).to(mean.dtype), (variance.double() * ratio).to(variance.dtype)
