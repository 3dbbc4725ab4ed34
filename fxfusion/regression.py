"""Layers of a merged network, fitted to its parents by least squares, one after the other.

Aligned parents and the merged network run side by side on calibration data. Where a layer ``W x + b`` of the
merged network gets ``x``, and the aligned parents' layers give ``t`` on average, what is missing is regressed
on ``x``::

    min over D, d of  E |t - (W + D) x - b - d|^2  +  ridge * (tr C / n) |D|^2,     C = cov(x)
    D = cov(t - W x, x) (C + ridge * (tr C / n) I)^-1

so that the less the data say, the more stays as it was merged. The next layer is fitted on what the fitted
ones before it give. A parent of other widths runs as it is: what its layers give is carried into the target's
basis, so that what is lost where units are merged is made up for, too. It needs no labels and no gradients,
and keeps the class. Regressions to a mean are those of model merging, as in Jin et al., RegMean, ICLR 2023;
here the inputs are the merged network's own, and so are those of Nasery et al., PLeaS, CVPR 2025.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from fxfusion.calibration import Batches
from fxfusion.capture import Capture
from fxfusion.execution import Live, Program, by_capture
from fxfusion.progress import Progress, silent
from fxfusion.repair import Channels, Layer, Source, batch_norms, carried_moments, corrected, layers_of
from fxfusion.rules.registry import operator_name
from fxfusion.staging import Shelf
from fxfusion.statistics import CrossMoments

RIDGE = 0.001  # of the mean variance of a layer's inputs
MEMORY = 2**30  # bytes of activations between two layers; the rest waits in files
_ROUNDING = 1e-4  # relative to the deviation of what a layer gives
_TINY = 1e-30
PICKING = (
    "index",
    "index_select",
    "gather",
    "take_along_dim",
    "index_put",
    "scatter",
    "scatter_add",
    "index_add",
)
VIEWS = ("view", "reshape", "_unsafe_view", "clone", "contiguous", "unflatten")

State = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Fitted:
    """A layer that is fitted.

    Attributes
    ----------
    layer : Layer
    skip : Node or None
        What its output is added to and nothing else: then the sum is fitted, so that the layer makes up, as
        far as it can, for what the skip lacks.
    """

    layer: Layer
    skip: fx.Node | None

    @property
    def place(self) -> int:
        """Of what the layer is applied to, among its arguments."""
        return int(operator_name(self.layer.node.target) == "addmm")

    def features(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the numbers that units are linear in: ``[groups, numbers, samples]``."""
        if not self.layer.convolves:
            return x.reshape(-1, x.shape[-1]).mT[None]
        stride, padding, dilation, groups = _settings(self.layer.node, weight.ndim - 2)
        kernel = tuple(weight.shape[2:])
        if len(kernel) == 1:  # unfolding is of images
            x, kernel = x.unsqueeze(2), (1, *kernel)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        patches = functional.unfold(x, kernel, dilation, padding, stride)
        return patches.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)

    def units(self, y: torch.Tensor) -> torch.Tensor:
        """Return what units give: ``[groups, units, samples]``."""
        if not self.layer.convolves:
            return y.reshape(-1, y.shape[-1]).mT[None]
        *_, groups = _settings(self.layer.node, y.ndim - 2)
        return y.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)

    def changed(
        self, state: State, slope: torch.Tensor, shift: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return weight and bias with ``slope`` ``[groups, units, numbers]`` and ``shift`` added."""
        layer = self.layer
        weight = state[layer.weight]
        added = slope[0].mT if layer.axis else slope.flatten(0, 1).reshape(weight.shape)
        found = {layer.weight: (weight.double() + added).to(weight.dtype)}
        if layer.bias is not None and shift is not None:
            bias = state[layer.bias]
            found[layer.bias] = (bias.double() + shift.flatten()).to(bias.dtype)
        return found


def _chosen(program: Program) -> set[fx.Node]:
    """Return the nodes whose samples a network chooses itself, such as tokens for experts.

    There the parents' samples are not the merged network's.
    """
    found: set[fx.Node] = set()
    for node in program.nodes:
        picks = node.op == "call_function" and operator_name(node.target) in PICKING
        indices = [item for item in node.all_input_nodes[1:] if item not in program.shared] if picks else []
        integer = [item for item in indices if not _floating(item)]
        if integer or any(item in found for item in node.all_input_nodes):
            found.add(node)
    return found


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _settings(node: fx.Node, axes: int) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups of a convolution."""
    given = [*node.args[3:7], *[1, 0, 1, 1][max(len(node.args) - 3, 0) :]]
    pairs = [tuple(item) if isinstance(item, (list, tuple)) else (item,) for item in given[:3]]
    return (*(item * axes if len(item) == 1 else item for item in pairs), given[3])


def _layers(capture: Capture, program: Program) -> dict[str, _Fitted]:
    """Return what can be fitted, by name of its node."""
    chosen = _chosen(program)
    found = {}
    for layer in layers_of(capture):
        node = layer.node
        volumes = operator_name(node.target) == "conv3d"
        padded = any(isinstance(item, str) for item in node.args)  # by name, which depends on sizes
        output = node.meta.get("val")
        batched = isinstance(output, torch.Tensor) and output.ndim == len(capture.parameters[layer.weight])
        if not (volumes or padded or node in chosen) and (batched or not layer.convolves):
            found[node.name] = _Fitted(layer, _skip(node))
    return found


def _skip(node: fx.Node) -> fx.Node | None:
    """Return what a node's output is added to, if that is known before and the output has no other use."""
    output = node
    while len(output.users) == 1:
        (user,) = output.users
        operator = operator_name(user.target) if user.op == "call_function" else ""
        if operator in VIEWS and user.args[0] is output:
            output = user
        elif operator == "add" and len(user.args) == 2 and not user.kwargs:
            left, right = user.args
            other = right if left is output else left
            known = isinstance(other, fx.Node) and other.op != "get_attr" and other < node
            return other if known and _sized_alike(other, output) else None  # type: ignore[return-value]
        else:
            return None
    return None


def _sized_alike(left: Any, right: fx.Node) -> bool:
    values = [node.meta.get("val") for node in (left, right)]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


class _Fit:
    """A layer's regression, batch by batch."""

    def __init__(
        self, fitted: _Fitted, state: State, sources: Sequence[Source], weights: Sequence[float]
    ) -> None:
        self.fitted, self.state, self.sources, self.weights = fitted, state, sources, weights
        self.place = fitted.place
        self.moments: CrossMoments | None = None
        self.expected = Channels()
        self.sum: torch.Tensor | None = None  # of what the parents give, for the batch at hand

    def see(self, side: int, x: torch.Tensor, output: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Add the layer's input and output in one network: the parents one by one, then the merged one."""
        if skip is not None:
            output = output + skip.reshape(output.shape)
        if side < len(self.weights):
            carry = self.sources[side].outputs
            found = self.weights[side] * (
                output if carry is None else carry[self.fitted.layer.node.name](output)
            )
            self.sum = found if self.sum is None else self.sum.add_(found)
            return
        expected, self.sum = self.sum, None
        assert expected is not None
        features = _wide(self.fitted.features(x, self.state[self.fitted.layer.weight]))
        missing = _wide(self.fitted.units(expected - output))
        if self.moments is None:
            sizes = len(features), features.shape[1], missing.shape[1]
            self.moments = CrossMoments(*sizes, own=True, device=features.device)
        self.moments.update(features, missing)
        self.expected.update(self.fitted.units(expected).flatten(0, 1).mT)

    def solve(self) -> dict[str, torch.Tensor]:
        """Return the layer's new weight and bias; nothing where rounding is all that is missing."""
        moments, bias = self.moments, self.fitted.layer.bias
        assert moments is not None
        assert moments.own is not None
        error = moments.square_source / moments.count + moments.mean_source.square()
        deviation = self.expected.variance.reshape(error.shape).sqrt()
        if bool((error.sqrt() <= _ROUNDING * deviation).all()):
            return {}
        inner, cross = moments.own, moments.cross
        if bias is None:  # moments about zero, then
            mean = moments.mean_target.unsqueeze(-1)
            inner = inner + moments.count * mean @ mean.mT
            cross = cross + moments.count * mean @ moments.mean_source.unsqueeze(-2)
        spread = torch.diagonal(inner, dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        slope = torch.linalg.solve(inner + (RIDGE * spread).clamp_min(_TINY) * eye, cross).mT
        shift = None
        if bias is not None:
            shift = moments.mean_source - (slope @ moments.mean_target.unsqueeze(-1))[..., 0]
        if not bool(slope.isfinite().all()):  # activations overflow: nothing is learned from them
            return {}
        return self.fitted.changed(self.state, slope, shift)


class _Norm:
    """Statistics of a batch normalisation, batch by batch."""

    place = 0

    def __init__(
        self, names: tuple[str, str], state: State, sources: Sequence[Source], weights: Sequence[float]
    ) -> None:
        self.names, self.state, self.sources, self.weights = names, state, sources, weights
        self.sides = [Channels() for _ in range(len(weights) + 1)]

    def see(self, side: int, x: torch.Tensor, output: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Add the input in one network: a parent or the merged one."""
        self.sides[side].update(x)

    def solve(self) -> dict[str, torch.Tensor]:
        """Return the corrected mean and variance."""
        parents = [
            carried_moments(seen, source.carry, self.names)
            for seen, source in zip(self.sides, self.sources, strict=False)
        ]
        own = self.sides[-1].mean, self.sides[-1].variance
        stored = (self.state[name] for name in self.names)
        return dict(zip(self.names, corrected(own, parents, self.weights, *stored), strict=True))


_Override = Callable[[fx.Node, int, tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Networks that share a graph.

    Attributes
    ----------
    program : Program
    sides : list of int
        Which networks: numbers of parents, or one above for the merged network.
    states : list of mapping
    """

    program: Program
    sides: list[int]
    states: list[State]

    def watching(
        self, place: int, stop: _Fit | _Norm, skip: int | None, merged: int, live: Live
    ) -> _Override:
        """Return what shows a stop its node; in the merged network the input stands for the output."""
        node = self.program.nodes[place]

        def override(at: fx.Node, number: int, args: tuple[Any, ...]) -> Any:
            if at is not node:
                return None
            value: torch.Tensor = at.target(*args)
            known = ChainMap(live.own[number], live.shared)
            added = None if skip is None else known[self.program.nodes[skip]]
            stop.see(self.sides[number], args[stop.place], value, added)
            return args[stop.place] if self.sides[number] == merged else value

        return override


def _applied(node: fx.Node, place: int, x: torch.Tensor, capture: Capture, state: State) -> Any:
    """Return what a node gives for an input, by the weights of a state."""

    def look_up(item: fx.Node) -> Any:
        return state[capture.aliases.get(str(item.target), str(item.target))]

    args = [x if number == place else fx.map_arg(arg, look_up) for number, arg in enumerate(node.args)]
    return node.target(*args)  # type: ignore[operator]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def fitted_layers(
    capture: Capture,
    merged: State,
    parents: Sequence[Source],
    weights: Sequence[float],
    batches: Batches,
    progress: Progress = silent,
    memory: int = MEMORY,
) -> dict[str, torch.Tensor]:
    """Return weights and biases by which layers give what the parents' layers give on average.

    Batch normalisations between them get the statistics that :mod:`fxfusion.repair` gives them. Layers whose
    weight or bias is used elsewhere, too, convolutions over volumes, and what gets samples that the network
    chooses itself (experts) stay as they are merged.

    Parameters
    ----------
    capture : Capture
    merged : mapping of str to torch.Tensor
        The fused weights.
    parents : sequence of Source
        In the target's basis, or with what carries their layers' outputs into it. Graphs of other widths
        correspond to the target's node by node.
    weights : sequence of float
        Their shares. Parents without one are not run.
    batches : Batches
        Calibration data. All of it waits between two layers, in memory as far as it goes.
    progress : callable, optional
    memory : int
        Bytes of it; the rest waits in temporary files.

    Returns
    -------
    dict of str to torch.Tensor
        By name of the parameter or buffer; empty for a network without layers.
    """
    taking = [number for number, share in enumerate(weights) if share != 0]
    sources, shares = [parents[number] for number in taking], [weights[number] for number in taking]
    state = dict(merged)
    networks = [*sources, Source(capture, state)]
    groups = [
        _Group(Program(networks[sides[0]].capture), sides, [networks[side].state for side in sides])
        for sides in by_capture([network.capture for network in networks])
    ]  # the merged network comes last
    program = groups[-1].program
    nodes, order = program.nodes, {node: place for place, node in enumerate(program.nodes)}
    norms = batch_norms(capture)
    layers = {
        name: fitted
        for name, fitted in _layers(capture, program).items()
        if all(source.outputs is None or name in source.outputs for source in sources)
    }
    places = [place for place, node in enumerate(nodes) if node.name in layers or node.name in norms]
    changed: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        shelf = Shelf(Path(folder), memory)
        count = 0
        for args, kwargs in batches:
            shelf.put(count, [group.program.start(args, kwargs, len(group.sides)) for group in groups])
            count += 1
        begun, before = 0, None
        for number, place in enumerate(places, start=1):
            node, skip = nodes[place], None
            stop: _Fit | _Norm
            if node.name in layers:
                stop = _Fit(layers[node.name], state, sources, shares)
                added = layers[node.name].skip
                skip = None if added is None else order[added]
            else:
                stop = _Norm(norms[node.name], state, sources, shares)
            for batch in range(count):
                lives = shelf.take(batch)
                own = lives[-1].own[-1]
                if before is not None and before[0] in own:  # its input waits there for it to be fitted
                    own[before[0]] = _applied(*before, own[before[0]], capture, state)
                for group, live in zip(groups, lives, strict=True):
                    watch = group.watching(place, stop, skip, len(sources), live)
                    part = group.program.nodes[begun : place + 1]
                    for _ in group.program.advance(live, part, group.states, watch):
                        pass
                shelf.put(batch, lives)
            found = stop.solve()
            state.update(found)
            changed |= found
            begun, before = place + 1, (node, stop.place)
            progress("repair", number, len(places))
    return changed
