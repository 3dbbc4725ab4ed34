"""Statistics of a merged network, corrected by what calibration data show.

Those of batch normalisations are buffers. Units that a linear layer or a convolution with a bias writes get
the mean and deviation that the parents' have on average by scaling its rows and moving its bias (Jordan et
al., REPAIR, ICLR 2023), which needs no normalisation and leaves the class as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.calibration import Batches, Inputs
from fxfusion.capture import Capture
from fxfusion.execution import Program, by_capture, run_together
from fxfusion.progress import Progress, silent
from fxfusion.rules.registry import operator_name

LAYERS = {
    "linear": (1, 2, 0),
    "addmm": (2, 0, 1),
    "conv1d": (1, 2, 0),
    "conv2d": (1, 2, 0),
    "conv3d": (1, 2, 0),
}
"""Positions of weight and bias among the arguments, and the weight's axis of units."""
BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_TINY = 1e-12
_ROUNDING = 1e-4  # relative to a standard deviation or variance


@dataclasses.dataclass(eq=False)
class Channels:
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


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A parent, or the merged network, whose activations are measured.

    Attributes
    ----------
    capture : Capture
        Its graph: the target's, or its own if its widths differ.
    state : mapping of str to torch.Tensor
        Its weights: in the target's basis, or its own if its widths differ.
    carry : callable ``(buffer, values) -> values``, optional
        Carries one number per channel into the target's basis; not needed for weights that are in it.
    outputs : mapping of str to callable ``output -> output``, optional
        By name of a layer's node: carries what the layer gives, likewise. Layers that are not in it stay.
    """

    capture: Capture
    state: Mapping[str, torch.Tensor]
    carry: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    outputs: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None


def corrected_statistics(
    capture: Capture,
    merged: Mapping[str, torch.Tensor],
    parents: Sequence[Source],
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
    parents : sequence of Source
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
    found: dict[str, torch.Tensor] = {}
    norms = batch_norms(capture)
    if not norms:
        return found
    # A layer's input depends on the statistics before it, so that layers settle in graph order; all
    # layers are measured in one run, each batch normalised by the statistics that it corrects itself.
    sources = [*parents, Source(capture, merged)]
    seen = {(name, side): Channels() for name in norms for side in range(len(sources))}

    def corrections(name: str, args: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        sides = [
            carried_moments(seen[name, side], source.carry, norms[name])
            for side, source in enumerate(sources)
        ]
        return corrected(sides[-1], sides[:-1], weights, *args)

    def measuring(sides: Sequence[int]) -> Callable[[fx.Node, int, tuple[Any, ...]], Any]:
        def override(node: fx.Node, index: int, args: tuple[Any, ...]) -> Any:
            if node.name not in norms:
                return None
            seen[node.name, sides[index]].update(args[0])
            if sides[index] < len(parents):
                return None
            return node.target(*args[:3], *corrections(node.name, args[3:5]), *args[5:])  # type: ignore[operator]

        return override

    # The merged network comes last at every node: it needs what the others show there.
    groups = by_capture([source.capture for source in sources])
    programs = [(Program(sources[group[0]].capture), group) for group in groups]
    for done, (args, kwargs) in enumerate(batches, start=1):
        run_together(
            [
                program.steps([sources[side].state for side in group], args, kwargs, measuring(group))
                for program, group in programs
            ]
        )
        progress("repair", done, len(batches))
    for name, buffers in norms.items():
        found.update(zip(buffers, corrections(name, [merged[buffer] for buffer in buffers]), strict=True))
    return found


def batch_norms(capture: Capture) -> dict[str, tuple[str, str]]:
    """Return the buffers of mean and variance of every batch normalisation, by name of its graph node."""
    found = {}
    for node in capture.module.graph.nodes:
        if operator_name(node.target) in BATCH_NORMS and isinstance(node.args[3], fx.Node):
            mean, variance = (str(item.target) for item in node.args[3:5])
            found[node.name] = capture.aliases.get(mean, mean), capture.aliases.get(variance, variance)
    return found


def measured_norms(
    program: Program,
    norms: Mapping[str, tuple[str, str]],
    states: Sequence[Mapping[str, torch.Tensor]],
    inputs: Iterable[Inputs],
) -> list[dict[str, torch.Tensor]]:
    """Return the statistics of what batch normalisations get, by name of the buffer.

    Parameters
    ----------
    program : Program
    norms : mapping
        Of :func:`batch_norms`.
    states : sequence of mapping
        Weights of several networks.
    inputs : iterable
        Calibration data.

    Returns
    -------
    list of dict
        One per network.
    """
    seen = {(name, side): Channels() for name in norms for side in range(len(states))}

    def override(node: fx.Node, index: int, args: tuple[Any, ...]) -> Any:
        if node.name in norms:
            seen[node.name, index].update(args[0])

    for args, kwargs in inputs:
        program.run(states, args, kwargs, override=override)
    return [
        {
            buffer: values.float()
            for name, (mean, variance) in norms.items()
            for buffer, values in (
                (mean, seen[name, side].mean),
                (variance, seen[name, side].variance),
            )
        }
        for side in range(len(states))
    ]


def carried_moments(
    moments: Channels,
    carry: Callable[[str, torch.Tensor], torch.Tensor] | None,
    names: Sequence[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance per channel of the target, given what carries a buffer's values.

    The variance of an average of channels is taken as the average of theirs, as where they are equal.
    """
    mean, variance = moments.mean, moments.variance
    return (mean, variance) if carry is None else (carry(names[0], mean), carry(names[1], variance))


def corrected(
    own: tuple[torch.Tensor, torch.Tensor],
    parents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights: Sequence[float],
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correct a stored mean and variance by how the merged network's differ from the parents'.

    Parameters
    ----------
    own : tuple of torch.Tensor
        Mean and variance of the merged network's channels.
    parents : sequence of tuple of torch.Tensor
        Those of the parents' channels.
    weights : sequence of float
        Their shares.
    mean, variance : torch.Tensor
        What is stored.
    """
    shares = torch.tensor(weights, dtype=torch.float64, device=own[0].device)
    expected_mean = shares @ torch.stack([item[0] for item in parents])
    expected = shares @ torch.stack([item[1] for item in parents])
    ratio = torch.where(expected > _TINY, own[1] / (expected + _TINY), 1.0)
    shift = own[0] - expected_mean
    # Float32 activations carry rounding: what is no larger is no difference, and stays uncorrected.
    ratio = torch.where((ratio - 1.0).abs() > _ROUNDING, ratio, 1.0)
    shift = torch.where(shift.abs() > _ROUNDING * expected.sqrt(), shift, 0.0)
    return (mean.double() + shift).to(mean.dtype), (variance.double() * ratio).to(variance.dtype)


# -- units ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution of whose weight and bias there is no other use.

    Attributes
    ----------
    node : Node
    weight : str
    bias : str or None
    axis : int
        Of the weight, that enumerates units.
    """

    node: fx.Node
    weight: str
    bias: str | None
    axis: int

    @property
    def convolves(self) -> bool:
        """Whether units are the axis after the batch of the output, not the last one."""
        return operator_name(self.node.target).startswith("conv")


def uses(capture: Capture) -> dict[str, list[fx.Node]]:
    """Return the nodes that use every stored tensor, by the name that the graph uses."""
    found: dict[str, list[fx.Node]] = {}
    for node in capture.module.graph.nodes:
        if node.op == "get_attr":
            name = capture.aliases.get(str(node.target), str(node.target))
            found.setdefault(name, []).extend(node.users)
    return found


def layers_of(capture: Capture) -> list[Layer]:
    """Return the layers of which nothing else uses weight and bias."""
    readers = uses(capture)
    tied = set(capture.aliases.values())
    found = []
    for node in capture.module.graph.nodes:
        if node.op != "call_function" or operator_name(node.target) not in LAYERS or node.kwargs:
            continue
        weight, bias, axis = LAYERS[operator_name(node.target)]
        given = [node.args[place] if len(node.args) > place else None for place in (weight, bias)]
        names = [
            capture.aliases.get(str(item.target), str(item.target))
            for item in given
            if isinstance(item, fx.Node) and item.op == "get_attr"
        ]
        if not names or len(names) != sum(item is not None for item in given):  # something is computed
            continue
        alone = all(
            name in capture.parameters and name not in tied and readers[name] == [node] for name in names
        )
        own = names[1] if len(names) > 1 else None
        if alone and (own is None or len(capture.parameters[own]) == 1):
            found.append(Layer(node, names[0], own, axis))
    return found


def rescaled_units(
    capture: Capture,
    merged: Mapping[str, torch.Tensor],
    parents: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
    batches: Batches,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Return weights and biases by which units have the parents' average mean and standard deviation.

    Layers are corrected in the order in which the network computes, each on inputs corrected before.

    Parameters
    ----------
    capture : Capture
    merged : mapping of str to torch.Tensor
        The fused weights.
    parents : sequence of mapping
        The parents' weights in the target's basis.
    weights : sequence of float
        Their shares.
    batches : Batches
        Calibration data.
    progress : callable, optional

    Returns
    -------
    dict of str to torch.Tensor
        By name of the parameter; empty for a network without layers that have a bias.
    """
    layers = {layer.node.name: layer for layer in layers_of(capture) if layer.bias is not None}
    program = Program(capture)
    shares = torch.tensor(weights, dtype=torch.float64, device=program.device)
    seen = {(name, side): Channels() for name in layers for side in range(len(parents) + 1)}

    def change(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by what a layer's units are multiplied, and what is added then."""
        sides = [seen[name, side] for side in range(len(parents) + 1)]
        means, deviations = (
            torch.stack(items)
            for items in ([item.mean for item in sides], [item.variance.sqrt() for item in sides])
        )
        expected, own = shares @ deviations[:-1], deviations[-1]
        scale = torch.where(own > _ROUNDING * expected, expected / own.clamp_min(_TINY), 1.0)
        # Float32 activations carry rounding: what is no larger is no difference, and stays uncorrected.
        scale = torch.where((scale - 1.0).abs() > _ROUNDING, scale, 1.0)
        shift = shares @ means[:-1] - scale * means[-1]
        kept = (scale == 1.0) & (shift.abs() <= _ROUNDING * expected)
        return scale, torch.where(kept, 0.0, shift)

    def override(node: fx.Node, index: int, args: tuple[Any, ...]) -> Any:
        if node.name not in layers:
            return None
        output = node.target(*args)  # type: ignore[operator]
        last = not layers[node.name].convolves
        seen[node.name, index].update(output.movedim(-1, 1) if last else output)
        if index < len(parents):
            return output
        shape = [-1] if last else [-1, *[1] * (output.ndim - 2)]
        scale, shift = (item.to(output.dtype).reshape(shape) for item in change(node.name))
        return output * scale + shift

    for done, (args, kwargs) in enumerate(batches, start=1):
        program.run([*parents, merged], args, kwargs, override=override)
        progress("repair", done, len(batches))
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        scale, shift = change(name)
        assert layer.bias is not None
        weight, bias = merged[layer.weight], merged[layer.bias]
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        found[layer.weight] = (weight.double() * scale.reshape(shape)).to(weight.dtype)
        found[layer.bias] = (bias.double() * scale + shift).to(bias.dtype)
    return found
