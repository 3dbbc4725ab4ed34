"""Random networks of real layers, whose inferred symmetries are held against the networks themselves."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfusion.capture import Capture
from fxfusion.certify import TOLERANCE, certify_plan
from fxfusion.folding import can_fold
from fxfusion.groups import enlarge
from fxfusion.plan import Plan
from fxfusion.planning import make_plan
from fxfusion.testing.choices import Choices, strategy_of
from fxfusion.testing.network_blocks import draw_layer
from fxfusion.testing.network_graph import BATCH, Flow, NetworkGraph, Shape
from fxfusion.testing.network_layers import Layer

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

aten = torch.ops.aten
CLASSES = 3  # outputs per vector or token
SENSITIVE = 1e-6  # relative change of the outputs by half a group element that counts as a change
VECTORS = Shape(3)
_SHAPES = (
    VECTORS,
    Shape(3, (4,)),
    Shape(3, (4, 4), last=False),
    Shape(2, (5,), last=False),
    Shape(3, (6, 4), last=False),
)
_OUTPUT = frozenset({0})


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a description that prints, compares and shrinks.

    Attributes
    ----------
    shape : Shape
        What flows in: vectors, tokens, signals or images.
    stem : int
        Width of the first layer, which reads the input.
    layers : tuple of Layer
    vocabulary : int
        If positive, the inputs are integers below it and the first layer is an embedding.
    tied : bool
        The last layer is the embedding again.
    seed : int
        Draws weights and inputs.

    Examples
    --------
    >>> from fxfusion.testing.network_layers import Activation, Linear
    >>> network = Network(Shape(3), 4, (Activation("relu"), Linear(6), Activation("gelu")))
    >>> network.build()(*network.inputs()).shape
    torch.Size([2, 3])
    """

    shape: Shape = VECTORS
    stem: int = 2
    layers: tuple[Layer, ...] = ()
    vocabulary: int = 0
    tied: bool = False
    seed: int = 0

    def build(self) -> fx.GraphModule:
        """Return the network as a module with random float64 weights."""
        net, output = self._enter()
        net.graph.output(output)
        return fx.GraphModule(net.root, net.graph)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Return random inputs, always the same."""
        return tuple(self._enter()[0].inputs)

    def captured(self) -> tuple[Capture, dict[str, torch.Tensor], int]:
        """Return the network as a captured model, its weights, and how many free spaces it must have."""
        net, output = self._enter()
        expected = net.expected
        return net.finish([output]), net.state, expected

    def _enter(self) -> tuple[NetworkGraph, fx.Node]:
        net = NetworkGraph(self.seed)
        flow = self._first(net)
        table = flow.stream
        flow = net.run(self.layers, flow)
        return net, self._last(net, flow, table)

    def _first(self, net: NetworkGraph) -> Flow:
        shape = self.shape.wide(self.stem)
        with net.within("stem"):
            stream = net.stream("width", self.stem)
            if self.vocabulary:
                drawn = torch.randint(
                    self.vocabulary, (BATCH, *self.shape.positions), generator=net.generator
                )
                table = net.parameter("weight", self.vocabulary, self.stem)
                return Flow(net.call(aten.embedding.default, table, net.input(drawn)), shape, stream)
            x = net.input(net.normal(*self.shape.sizes))
            bias = None
            if self.shape.last:
                weight = net.parameter("weight", self.stem, self.shape.channels)
                return Flow(net.call(aten.linear.default, x, weight, bias), shape, stream)
            weight = net.parameter("weight", self.stem, self.shape.channels, *[1] * len(self.shape.positions))
            operator = aten.conv1d.default if len(self.shape.positions) == 1 else aten.conv2d.default
            return Flow(net.call(operator, x, weight, bias), shape, stream)

    def _last(self, net: NetworkGraph, flow: Flow, table: Any) -> fx.Node:
        node = flow.node
        if not flow.shape.last:
            node = net.call(aten.mean.dim, node, list(range(2, len(flow.shape.sizes))))
        with net.within("head"):
            if self.tied and self.vocabulary and flow.shape.channels == self.stem:
                net.merge(table, flow.stream)
                bias = net.parameter(
                    "bias", self.vocabulary, like="bias"
                )  # no output is zero but for rounding
                return net.call(aten.linear.default, node, net.tied("stem.weight"), bias)
            weight = net.parameter("weight", CLASSES, flow.shape.channels)
            return net.call(aten.linear.default, node, weight, net.parameter("bias", CLASSES, like="bias"))


# -- drawing --------------------------------------------------------------------------------------


def networks(max_layers: int = 6) -> SearchStrategy[Network]:
    """Return a hypothesis strategy that draws networks.

    Dense and convolutional layers, grouped and depthwise ones, norms, attention in every packing, residual
    additions, concatenations, splits, gates, views, pooling, padding, layers called twice, tied weights.

    Parameters
    ----------
    max_layers : int
        Layers between the first and the last one; some of them hold further layers.

    Raises
    ------
    MissingDependencyError
        If hypothesis is not installed.

    Examples
    --------
    >>> import hypothesis
    >>> @hypothesis.settings(max_examples=3, database=None, derandomize=True)
    ... @hypothesis.given(networks(max_layers=2))
    ... def test(network):
    ...     assert check_network(network).ok
    >>> test()
    """
    return strategy_of(functools.partial(draw_network, max_layers=max_layers))


def draw_network(choices: Choices, max_layers: int) -> Network:
    """Draw one network."""
    shape = choices.of(_SHAPES)
    vocabulary = 5 if shape.last and shape.positions and choices.flag() else 0
    stem = choices.of((2, 4, 6, 8, 3, 12))
    tied = bool(vocabulary) and choices.flag()
    layers: list[Layer] = []
    flowing = shape.wide(stem)
    for _ in range(choices.whole(1, max_layers)):
        layer = choices.part(functools.partial(draw_layer, shape=flowing))
        layers.append(layer)
        flowing = layer.result(flowing)
    return Network(shape, stem, tuple(layers), vocabulary, tied, choices.whole(0, 1 << 16))


# -- checking -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkCheck:
    """What :func:`check_network` found.

    Attributes
    ----------
    error : float
        Relative change of the outputs under a random element of the inferred group, in float64.
    largest : float
        The same with more than permutations in every space that has more (:mod:`fxfusion.groups`).
    control : float
        The same when a random half of the parameters is left as it was: that must not be small, except
        for the odd network that does not use what it computes. 0 if no parameter holds a space.
    spaces, expected : int
        Free spaces that were found, and that the network has by construction, at least.
    """

    error: float
    largest: float
    control: float
    spaces: int
    expected: int

    @property
    def ok(self) -> bool:
        """Whether the outputs stayed the same and no space was lost."""
        return max(self.error, self.largest) <= TOLERANCE and self.spaces >= self.expected

    @property
    def sensitive(self) -> bool:
        """Whether the control changed the outputs."""
        return self.control > SENSITIVE


def check_network(network: Network, seed: int = 0) -> NetworkCheck:
    """Hold what is inferred about a network against the network.

    Parameters
    ----------
    network : Network
    seed : int
        Draws the element of the group.

    Returns
    -------
    NetworkCheck

    Examples
    --------
    >>> from fxfusion.testing.network_layers import Activation
    >>> found = check_network(Network(Shape(3), 4, (Activation("relu"),)))
    >>> found.ok, found.sensitive, found.spaces, found.expected
    (True, True, 1, 1)
    """
    capture, state, expected = network.captured()
    plan = make_plan(capture, _OUTPUT)
    certificate = certify_plan(capture, plan, state, _OUTPUT, seed)
    larger = enlarge(capture, plan, lambda fold: can_fold(fold, state))
    largest = certify_plan(capture, larger, state, _OUTPUT, seed)
    half = _half(plan, seed)
    control = certify_plan(capture, half, state, _OUTPUT, seed).max_relative_error if half.layouts else 0.0
    errors = certificate.max_relative_error, largest.max_relative_error
    return NetworkCheck(*errors, control, len(plan.spaces), expected)


def _half(plan: Plan, seed: int) -> Plan:
    """Return a plan that forgot a random half of the parameters that hold spaces."""
    names = sorted(name for name, layout in plan.layouts.items() if layout.spaces())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator)[: math.ceil(len(names) / 2)]
    kept = {names[index] for index in order if len(names) > 1}
    return dataclasses.replace(
        plan, layouts={name: layout for name, layout in plan.layouts.items() if name in kept}
    )
