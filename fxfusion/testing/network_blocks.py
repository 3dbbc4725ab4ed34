"""Layers of layers in drawn networks, and the table of all kinds of layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch

from fxfusion.testing.choices import Choices
from fxfusion.testing.network_attention import Attention
from fxfusion.testing.network_graph import Flow, NetworkGraph, Shape, Stream
from fxfusion.testing.network_layers import (
    LARGEST_WIDTH,
    Activation,
    ChannelShuffle,
    ClassToken,
    Convolution,
    Experts,
    Glu,
    HalvesMultiplied,
    HeadView,
    Layer,
    LayerScale,
    Linear,
    Norm,
    Ordered,
    PixelShuffle,
    PixelUnshuffle,
    Pool,
    Positions,
    Repeat,
    Resize,
    SqueezeExcite,
    TiedAutoencoder,
    TokenMixing,
    ToSignal,
    ToTokens,
    ToVector,
    ZeroPad,
)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Residual(Layer):
    """What flows in is added to what layers make of it; the last of them restores the width."""

    body: tuple[Layer, ...] = ()
    nesting: ClassVar[int] = 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Residual:
        return cls(draw_restoring(choices, shape))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        with net.within("body"):
            branch = net.run(self.body, flow)
        node = net.call(aten.add.Tensor, flow.node, branch.node)
        return flow.to(node, stream=net.merge(flow.stream, branch.stream))


@dataclasses.dataclass(frozen=True)
class Gated(Layer):
    """What flows in is multiplied by what layers make of it."""

    body: tuple[Layer, ...] = ()
    nesting: ClassVar[int] = 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Gated:
        return cls(draw_restoring(choices, shape))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        with net.within("body"):
            branch = net.run(self.body, flow)
        node = net.call(aten.mul.Tensor, flow.node, net.call(aten.sigmoid.default, branch.node))
        return flow.to(node, stream=net.merge(flow.stream, branch.stream))


@dataclasses.dataclass(frozen=True)
class Concatenated(Layer):
    """What flows in, followed by what layers make of it, along the channels."""

    body: tuple[Layer, ...] = ()
    nesting: ClassVar[int] = 1

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.channels <= LARGEST_WIDTH // 2

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Concatenated:
        return cls(draw_body(choices, shape))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(shape.channels + result_of(self.body, shape).channels)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        with net.within("body"):
            branch = net.run(self.body, flow)
        node = net.call(aten.cat.default, [flow.node, branch.node], flow.shape.axis)
        streams = (flow.stream, branch.stream)
        parts = [part for stream in streams for part in stream.resolved()]
        opaque = any(stream.opaque for stream in streams)
        return Flow(node, self.result(flow.shape), Stream(parts, opaque))


@dataclasses.dataclass(frozen=True)
class SplitOff(Layer):
    """Some channels pass by, layers treat the others, and both are concatenated again."""

    position: int = 1
    body: tuple[Layer, ...] = ()
    nesting: ClassVar[int] = 1

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return 1 < shape.channels <= LARGEST_WIDTH // 2

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> SplitOff:
        position = choices.whole(1, shape.channels - 1)
        return cls(position, draw_body(choices, shape.wide(shape.channels - position)))

    def result(self, shape: Shape) -> Shape:
        rest = result_of(self.body, shape.wide(shape.channels - self.position))
        return shape.wide(self.position + rest.channels)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        sizes, axis = [self.position, flow.shape.channels - self.position], flow.shape.axis
        first, second = net.items(net.call(aten.split_with_sizes.default, flow.node, sizes, axis))
        passed, treated = net.cut(flow.stream, self.position)
        with net.within("body"):
            branch = net.run(self.body, Flow(second, flow.shape.wide(sizes[1]), treated))
        node = net.call(aten.cat.default, [first, branch.node], axis)
        parts = [*passed.resolved(), *branch.stream.resolved()]
        opaque = passed.opaque or branch.stream.opaque
        return Flow(node, self.result(flow.shape), Stream(parts, opaque))


@dataclasses.dataclass(frozen=True)
class Twice(Layer):
    """Layers called twice with the same weights."""

    body: tuple[Layer, ...] = ()
    nesting: ClassVar[int] = 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Twice:
        return cls(draw_restoring(choices, shape))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        for _ in range(2):
            with net.within("body"):
                flow = net.run(self.body, flow)
        return flow


KINDS: tuple[type[Layer], ...] = (
    Linear,
    Convolution,
    Activation,
    Norm,
    Residual,
    Attention,
    LayerScale,
    Glu,
    Concatenated,
    SplitOff,
    Twice,
    Gated,
    HeadView,
    TiedAutoencoder,
    Experts,
    TokenMixing,
    SqueezeExcite,
    ChannelShuffle,
    PixelShuffle,
    PixelUnshuffle,
    Pool,
    Resize,
    ToVector,
    ToTokens,
    ToSignal,
    ClassToken,
    Positions,
    ZeroPad,
    Repeat,
    HalvesMultiplied,
    Ordered,
)
MOVING: tuple[type[Layer], ...] = (
    Pool,
    Resize,
    ToVector,
    ToTokens,
    ToSignal,
    ClassToken,
    PixelShuffle,
    PixelUnshuffle,
)
LONGEST_BODY = 3


def draw_layer(choices: Choices, shape: Shape, inside: bool = False) -> Layer:
    """Draw a layer that fits a shape; inside another one it keeps positions and holds no layers."""
    kinds = [kind for kind in KINDS if kind.fits(shape) and not (inside and (kind.nesting or kind in MOVING))]
    kind = choices.of(kinds)
    layer = kind.draw(choices, shape)
    if layer.result(shape).channels > LARGEST_WIDTH or (
        inside and layer.result(shape).positions != shape.positions
    ):
        return Activation()
    return layer


def draw_body(choices: Choices, shape: Shape) -> tuple[Layer, ...]:
    """Draw layers that keep positions."""
    layers: list[Layer] = []
    for _ in range(choices.whole(1, LONGEST_BODY)):
        layer = choices.part(functools.partial(draw_layer, shape=shape, inside=True))
        layers.append(layer)
        shape = layer.result(shape)
    return tuple(layers)


def draw_restoring(choices: Choices, shape: Shape) -> tuple[Layer, ...]:
    """Draw layers that keep positions and give as many channels as they get."""
    body = draw_body(choices, shape)
    before = result_of(body, shape)
    if before.channels == shape.channels and choices.flag():
        return body
    if not shape.last:
        return (*body, Convolution(shape.channels, choices.of((1, 3))))
    if Attention.fits(before) and choices.flag():
        return (*body, dataclasses.replace(Attention.draw(choices, before), width=shape.channels))
    return (*body, Linear(shape.channels))


def result_of(layers: tuple[Layer, ...], shape: Shape) -> Shape:
    """Return the shape after several layers."""
    for layer in layers:
        shape = layer.result(shape)
    return shape
