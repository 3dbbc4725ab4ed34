"""The layers of drawn networks: small frozen descriptions that enter themselves into a graph.

Every class says where it fits, how to draw one, what shape it gives, and which units it adds that inference
must leave free. Width 2 comes first everywhere: a counterexample shrinks towards few units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from fxfusion.testing.choices import Choices
from fxfusion.testing.network_graph import BATCH, Flow, NetworkGraph, Shape, Stream, Units

aten = torch.ops.aten
WIDTHS = (2, 3, 4, 6, 8, 12, 1)
EPSILON = 1e-5
LARGEST_WIDTH = 48  # channels beyond which nothing makes them more

LayerT = TypeVar("LayerT", bound="Layer")


class Layer:
    """One layer of a network."""

    nesting: ClassVar[int] = 0  # how many levels of layers lie inside

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        """Return whether a layer of this kind can follow a shape."""
        return True

    @classmethod
    def draw(cls: type[LayerT], choices: Choices, shape: Shape) -> LayerT:
        """Draw a layer that fits."""
        return cls()

    def result(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        """Enter the layer into a graph."""
        raise NotImplementedError


def along(flow: Flow) -> list[int]:
    """Return the shape in which a vector of channels broadcasts against an activation."""
    shape = [1] * (len(flow.shape.positions) + 2)
    shape[flow.shape.axis] = flow.shape.channels
    return shape if not flow.shape.last else [flow.shape.channels]


def channels_last(net: NetworkGraph, flow: Flow) -> fx.Node:
    return flow.node if flow.shape.last else net.call(aten.movedim.int, flow.node, 1, -1)


def as_before(net: NetworkGraph, flow: Flow, node: fx.Node) -> fx.Node:
    return node if flow.shape.last else net.call(aten.movedim.int, node, -1, 1)


def divisors(size: int) -> list[int]:
    return [divisor for divisor in range(2, size) if size % divisor == 0]


def linear(net: NetworkGraph, x: fx.Node, name: str, width: int, bias: bool = True) -> fx.Node:
    weight = net.parameter(f"{name}.weight", width, x.meta["val"].shape[-1])
    return net.call(
        aten.linear.default, x, weight, net.parameter(f"{name}.bias", width, like="bias") if bias else None
    )


# -- dense layers ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linear(Layer):
    """A dense layer over channels, in one of the ways to write it."""

    width: int = 2
    bias: bool = False
    spelling: str = "linear"

    SPELLINGS: ClassVar[tuple[str, ...]] = ("linear", "matmul", "addmm", "einsum", "bmm", "outer sum")

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Linear:
        return cls(choices.of(WIDTHS), choices.flag(), choices.of(cls.SPELLINGS))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(self.width)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        weight = net.parameter("weight", self.width, flow.shape.channels)
        bias = net.parameter("bias", self.width, like="bias") if self.bias else None
        shape = self.result(flow.shape)
        node = self._multiply(net, flow, weight, bias, shape)
        return Flow(node, shape, net.stream("width", self.width))

    def _multiply(
        self, net: NetworkGraph, flow: Flow, weight: fx.Node, bias: fx.Node | None, shape: Shape
    ) -> fx.Node:
        if self.spelling == "linear":
            return net.call(aten.linear.default, flow.node, weight, bias)
        if self.spelling == "addmm" and bias is not None:
            flat = net.call(aten.reshape.default, flow.node, [-1, flow.shape.channels])
            added = net.call(aten.addmm.default, bias, flat, net.call(aten.t.default, weight))
            return net.call(aten.view.default, added, list(shape.sizes))
        if self.spelling == "einsum":
            result = net.call(aten.einsum.default, "...i,oi->...o", [flow.node, weight])
        elif self.spelling == "bmm" and flow.shape.positions:
            transposed = net.call(aten.transpose.int, weight, 0, 1)
            batched = net.call(aten.expand.default, transposed, [BATCH, *transposed.meta["val"].shape])
            result = net.call(aten.bmm.default, flow.node, batched)
        elif self.spelling == "outer sum":
            product = net.call(aten.mul.Tensor, net.call(aten.unsqueeze.default, flow.node, -2), weight)
            result = net.call(aten.sum.dim_IntList, product, [-1])
        else:
            result = net.call(aten.matmul.default, flow.node, net.call(aten.t.default, weight))
        return result if bias is None else net.call(aten.add.Tensor, result, bias)


@dataclasses.dataclass(frozen=True)
class Glu(Layer):
    """A dense layer whose one half gates the other."""

    width: int = 2
    spelling: str = "chunk"

    SPELLINGS: ClassVar[tuple[str, ...]] = ("chunk", "glu", "two layers", "slices", "view")

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Glu:
        return cls(choices.of(WIDTHS), choices.of(cls.SPELLINGS))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(self.width)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        stream = net.stream("width", self.width)
        return Flow(self._gated(net, flow.node), self.result(flow.shape), stream)

    def _gated(self, net: NetworkGraph, x: fx.Node) -> fx.Node:
        if self.spelling == "two layers":
            gate, value = linear(net, x, "gate", self.width), linear(net, x, "value", self.width)
        else:
            packed = linear(net, x, "packed", 2 * self.width)
            if self.spelling == "glu":
                return net.call(aten.glu.default, packed, -1)
            gate, value = self._halves(net, packed)
        return net.call(aten.mul.Tensor, net.call(aten.silu.default, gate), value)

    def _halves(self, net: NetworkGraph, packed: fx.Node) -> list[fx.Node]:
        if self.spelling == "chunk":
            return net.items(net.call(aten.chunk.default, packed, 2, -1))
        if self.spelling == "slices":
            limits = ((0, self.width), (self.width, 2 * self.width))
            return [net.call(aten.slice.Tensor, packed, -1, start, stop) for start, stop in limits]
        shape = [*packed.meta["val"].shape[:-1], 2, self.width]
        return [
            net.call(aten.select.int, net.call(aten.view.default, packed, shape), -2, index)
            for index in range(2)
        ]


@dataclasses.dataclass(frozen=True)
class HalvesMultiplied(Layer):
    """The two halves of the channels multiplied, without a layer of their own."""

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.channels % 2 == 0

    def result(self, shape: Shape) -> Shape:
        return shape.wide(shape.channels // 2)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        node = net.call(aten.glu.default, flow.node, flow.shape.axis)
        halves = net.cut(flow.stream, flow.shape.channels // 2)
        if flow.stream.opaque:
            return Flow(node, self.result(flow.shape), net.lost(flow.shape.channels // 2))
        return Flow(node, self.result(flow.shape), net.merge(*halves))


@dataclasses.dataclass(frozen=True)
class TiedAutoencoder(Layer):
    """A dense layer and its transpose."""

    hidden: int = 2

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> TiedAutoencoder:
        return cls(choices.of(WIDTHS))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        weight = net.parameter("weight", self.hidden, flow.shape.channels)
        code = net.call(aten.tanh.default, net.call(aten.linear.default, flow.node, weight))
        net.space("hidden", self.hidden)
        return flow.to(net.call(aten.matmul.default, code, weight), stream=net.written(flow.stream))


@dataclasses.dataclass(frozen=True)
class Experts(Layer):
    """Batched experts, averaged by a soft router."""

    count: int = 2
    hidden: int = 2
    width: int = 2

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and len(shape.positions) == 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Experts:
        return cls(choices.of((2, 3)), choices.of(WIDTHS), choices.of(WIDTHS))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(self.width)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        first = net.parameter("first", self.count, self.hidden, flow.shape.channels)
        second = net.parameter("second", self.count, self.width, self.hidden)
        router = net.call(aten.softmax.int, linear(net, flow.node, "router", self.count), -1)
        hidden = net.call(aten.einsum.default, "btc,ehc->beth", [flow.node, first])
        given = net.call(aten.einsum.default, "beth,ewh->betw", [net.call(aten.relu.default, hidden), second])
        node = net.call(aten.einsum.default, "betw,bte->btw", [given, router])
        net.space("experts", self.count)
        net.space("hidden", self.hidden)
        return Flow(node, self.result(flow.shape), net.stream("width", self.width))


@dataclasses.dataclass(frozen=True)
class TokenMixing(Layer):
    """Two dense layers over positions (MLP-Mixer)."""

    hidden: int = 2

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and len(shape.positions) == 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> TokenMixing:
        return cls(choices.of(WIDTHS))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        turned = net.call(aten.transpose.int, flow.node, 1, 2)
        hidden = net.call(aten.gelu.default, linear(net, turned, "first", self.hidden))
        mixed = linear(net, hidden, "second", flow.shape.positions[0])
        net.space("hidden", self.hidden)
        return flow.to(net.call(aten.transpose.int, mixed, 1, 2))


# -- convolutions ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Convolution(Layer):
    """A convolution over one or two spatial axes, grouped or not, transposed or not."""

    width: int = 2
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    transposed: bool = False
    bias: bool = False

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return not shape.last

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Convolution:
        groups = choices.of([1, *divisors(shape.channels), *([shape.channels] if shape.channels > 1 else [])])
        width = groups * choices.of((1, 2, 3) if groups > 1 else WIDTHS)
        kernel = choices.of((1, 3))
        stride = choices.of((1, 2)) if min(shape.positions) > 2 else 1
        return cls(width, kernel, stride, groups, choices.flag() and stride == 1, choices.flag())

    def result(self, shape: Shape) -> Shape:
        positions = tuple(-(-size // self.stride) for size in shape.positions)
        return Shape(self.width, positions, last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        spatial = len(flow.shape.positions)
        inputs, outputs, taps = flow.shape.channels, self.width, [self.kernel] * spatial
        sizes = [inputs, outputs // self.groups] if self.transposed else [outputs, inputs // self.groups]
        weight = net.parameter("weight", *sizes, *taps)
        bias = net.parameter("bias", outputs, like="bias") if self.bias else None
        stride, padding, one = [self.stride] * spatial, [self.kernel // 2] * spatial, [1] * spatial
        if self.transposed:
            operator = aten.conv_transpose1d.default if spatial == 1 else aten.conv_transpose2d.input
            arguments: list[Any] = [stride, padding, [0] * spatial, self.groups, one]
        else:
            operator = aten.conv1d.default if spatial == 1 else aten.conv2d.default
            arguments = [stride, padding, one, self.groups]
        node = net.call(operator, flow.node, weight, bias, *arguments)
        return Flow(node, self.result(flow.shape), self._stream(net, flow))

    def _stream(self, net: NetworkGraph, flow: Flow) -> Stream:
        if self.groups == 1:
            return net.stream("width", self.width)
        each = self.width // self.groups
        if self.groups == flow.shape.channels:  # depthwise: channels stay, each gives several
            return net.times(flow.stream, net.space("each", each)) if each > 1 else flow.stream
        factors = net.factor(flow.stream, [self.groups, flow.shape.channels // self.groups])
        if factors is None:
            return net.lost(self.width)
        return Stream([[factors[0], net.space("each", each)] if each > 1 else [factors[0]]])


@dataclasses.dataclass(frozen=True)
class SqueezeExcite(Layer):
    """Channels scaled by a gate computed from their means."""

    hidden: int = 2

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return bool(shape.positions)

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> SqueezeExcite:
        return cls(choices.of(WIDTHS))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        first = 1 if flow.shape.last else 2
        axes = list(range(first, first + len(flow.shape.positions)))
        means = net.call(aten.mean.dim, flow.node, axes)
        hidden = net.call(aten.relu.default, linear(net, means, "reduce", self.hidden))
        gate = net.call(aten.sigmoid.default, linear(net, hidden, "expand", flow.shape.channels))
        shape = list(flow.shape.wide(flow.shape.channels).sizes)
        shape = [size if axis in (0, flow.shape.axis) else 1 for axis, size in enumerate(shape)]
        net.space("hidden", self.hidden)
        return flow.to(net.call(aten.mul.Tensor, flow.node, net.call(aten.view.default, gate, shape)))


@dataclasses.dataclass(frozen=True)
class ChannelShuffle(Layer):
    """Channels as (groups, each) become (each, groups)."""

    groups: int = 2

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return not shape.last and bool(divisors(shape.channels))

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> ChannelShuffle:
        return cls(choices.of(divisors(shape.channels)))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        sizes = flow.shape.sizes
        each = flow.shape.channels // self.groups
        split = net.call(aten.view.default, flow.node, [BATCH, self.groups, each, *sizes[2:]])
        turned = net.call(aten.transpose.int, split, 1, 2)
        node = net.call(aten.reshape.default, turned, list(sizes))
        factors = net.factor(flow.stream, [self.groups, each])
        if factors is None or len(factors) != 2:
            flow.stream.lose()
            return flow.to(node, stream=net.lost(flow.shape.channels))
        return flow.to(node, stream=Stream([factors[::-1]]))


@dataclasses.dataclass(frozen=True)
class PixelShuffle(Layer):
    """Channels become positions."""

    factor: int = 2
    spelling: str = "views"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return len(shape.positions) == 2 and shape.channels % 4 == 0 and math.prod(shape.positions) <= 16

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> PixelShuffle:
        return cls(2, choices.of(("views", "operator")))

    def result(self, shape: Shape) -> Shape:
        positions = tuple(size * self.factor for size in shape.positions)
        return Shape(shape.channels // self.factor**2, positions, last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape, factor = self.result(flow.shape), self.factor
        if self.spelling == "operator":
            flow.stream.lose()
            node = net.call(aten.pixel_shuffle.default, flow.node, factor)
            return Flow(node, shape, net.lost(shape.channels))
        height, width = flow.shape.positions
        split = net.call(aten.view.default, flow.node, [BATCH, shape.channels, factor, factor, height, width])
        turned = net.call(aten.permute.default, split, [0, 1, 4, 2, 5, 3])
        node = net.call(aten.reshape.default, turned, list(shape.sizes))
        factors = net.factor(flow.stream, [shape.channels, factor**2])
        if factors is None:
            return Flow(node, shape, net.lost(shape.channels))
        kept = factors[:-1] if factors[-1].size == factor**2 else []
        for units in factors[len(kept) :]:
            units.lose()
        return Flow(node, shape, Stream([kept]) if kept else net.lost(shape.channels))


@dataclasses.dataclass(frozen=True)
class PixelUnshuffle(Layer):
    """Positions become channels."""

    spelling: str = "views"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        even = all(size % 2 == 0 for size in shape.positions)
        return len(shape.positions) == 2 and even and 4 * shape.channels <= LARGEST_WIDTH

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> PixelUnshuffle:
        return cls(choices.of(("views", "operator")))

    def result(self, shape: Shape) -> Shape:
        return Shape(4 * shape.channels, tuple(size // 2 for size in shape.positions), last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape = self.result(flow.shape)
        height, width = shape.positions
        if self.spelling == "operator":
            flow.stream.lose()
            node = net.call(aten.pixel_unshuffle.default, flow.node, 2)
            return Flow(node, shape, net.lost(shape.channels))
        split = net.call(aten.view.default, flow.node, [BATCH, flow.shape.channels, height, 2, width, 2])
        turned = net.call(aten.permute.default, split, [0, 1, 3, 5, 2, 4])
        node = net.call(aten.reshape.default, turned, list(shape.sizes))
        return Flow(node, shape, net.times(flow.stream, Units(4, "lost")))


# -- pooling and positions ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pool(Layer):
    """Pooling by windows of two."""

    kind: str = "max"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return not shape.last and min(shape.positions) > 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Pool:
        return cls(choices.of(("max", "avg", "adaptive_avg")))

    def result(self, shape: Shape) -> Shape:
        return Shape(shape.channels, tuple(size // 2 for size in shape.positions), last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        spatial = len(flow.shape.positions)
        shape = self.result(flow.shape)
        sizes = list(shape.positions) if self.kind == "adaptive_avg" else [2] * spatial
        operator = getattr(aten, f"{self.kind}_pool{spatial}d").default
        return flow.to(net.call(operator, flow.node, sizes), shape)


@dataclasses.dataclass(frozen=True)
class Resize(Layer):
    """Positions doubled by interpolation."""

    kind: str = "nearest"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return not shape.last and len(shape.positions) == 2 and math.prod(shape.positions) <= 9

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Resize:
        return cls(choices.of(("nearest", "bilinear")))

    def result(self, shape: Shape) -> Shape:
        return Shape(shape.channels, tuple(2 * size for size in shape.positions), last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape = self.result(flow.shape)
        more = [False] if self.kind == "bilinear" else []
        operator = getattr(aten, f"upsample_{self.kind}2d").default
        return flow.to(net.call(operator, flow.node, list(shape.positions), *more), shape)


@dataclasses.dataclass(frozen=True)
class ToVector(Layer):
    """Positions summed up, picked from, or flattened into the channels."""

    kind: str = "mean"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return bool(shape.positions)

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> ToVector:
        flat = ["flatten"] * (shape.channels * math.prod(shape.positions) <= LARGEST_WIDTH)
        return cls(choices.of(["mean", "amax", "first", *flat]))

    def result(self, shape: Shape) -> Shape:
        count = math.prod(shape.positions) if self.kind == "flatten" else 1
        return Shape(shape.channels * count)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape = self.result(flow.shape)
        first = 1 if flow.shape.last else 2
        axes = list(range(first, first + len(flow.shape.positions)))
        if self.kind == "flatten":
            node = net.call(aten.flatten.using_ints, flow.node, 1)
            count = math.prod(flow.shape.positions)
            stream = (
                self._below(net, flow, count)
                if flow.shape.last
                else net.times(flow.stream, Units(count, "lost"))
            )
            return Flow(node, shape, stream)
        if self.kind == "first":
            node = flow.node
            for _ in axes:
                node = net.call(aten.select.int, node, first, 0)
        else:
            node = net.call(aten.mean.dim if self.kind == "mean" else aten.amax.default, flow.node, axes)
        return flow.to(node, shape)

    @staticmethod
    def _below(net: NetworkGraph, flow: Flow, count: int) -> Stream:
        parts = flow.stream.resolved()
        outer = [Units(count, "lost")] if count > 1 else []
        if len(parts) == 1 and not flow.stream.opaque:
            return Stream([[*outer, *parts[0]]])
        return Stream([[*outer, *(factor for part in parts for factor in part)]], opaque=True)


@dataclasses.dataclass(frozen=True)
class ToTokens(Layer):
    """An image or signal becomes a sequence."""

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return not shape.last

    def result(self, shape: Shape) -> Shape:
        return Shape(shape.channels, (math.prod(shape.positions),))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        flat = net.call(aten.flatten.using_ints, flow.node, 2)
        return flow.to(net.call(aten.transpose.int, flat, 1, 2), self.result(flow.shape))


@dataclasses.dataclass(frozen=True)
class ToSignal(Layer):
    """A sequence becomes a signal, or an image if its length is a square."""

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and len(shape.positions) == 1

    def result(self, shape: Shape) -> Shape:
        side = math.isqrt(shape.positions[0])
        positions = (side, side) if side * side == shape.positions[0] and side > 1 else shape.positions
        return Shape(shape.channels, positions, last=False)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape = self.result(flow.shape)
        turned = net.call(aten.permute.default, flow.node, [0, 2, 1])
        return flow.to(net.call(aten.reshape.default, turned, list(shape.sizes)), shape)


@dataclasses.dataclass(frozen=True)
class ClassToken(Layer):
    """A learned token before all others."""

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and len(shape.positions) == 1 and shape.positions[0] < 8

    def result(self, shape: Shape) -> Shape:
        return Shape(shape.channels, (shape.positions[0] + 1,))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        token = net.parameter("token", 1, 1, flow.shape.channels, like="bias")
        repeated = net.call(aten.expand.default, token, [BATCH, -1, -1])
        node = net.call(aten.cat.default, [repeated, flow.node], 1)
        return flow.to(node, self.result(flow.shape), net.written(flow.stream))


@dataclasses.dataclass(frozen=True)
class Positions(Layer):
    """A learned vector added at every position."""

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return bool(shape.positions)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        table = net.parameter("table", 1, *flow.shape.sizes[1:], like="bias")
        return flow.to(net.call(aten.add.Tensor, flow.node, table), stream=net.written(flow.stream))


# -- element by element ---------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "tanh": aten.tanh.default,
    "silu": aten.silu.default,
    "sigmoid": aten.sigmoid.default,
    "leaky_relu": aten.leaky_relu.default,
    "elu": aten.elu.default,
    "hardswish": aten.hardswish.default,
    "softplus": aten.softplus.default,
    "mish": aten.mish.default,
    "sin": aten.sin.default,
    "abs": aten.abs.default,
}


@dataclasses.dataclass(frozen=True)
class Activation(Layer):
    """An element-wise function, a softmax over channels, or one with a slope per channel."""

    name: str = "relu"

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Activation:
        slope = ["prelu"] * (shape.axis == 1)
        return cls(choices.of([*ACTIVATIONS, "softmax", "square", "clamp", "where", *slope]))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        stream = net.written(flow.stream) if self.name == "prelu" else flow.stream
        return flow.to(self._call(net, flow), stream=stream)

    def _call(self, net: NetworkGraph, flow: Flow) -> fx.Node:
        x = flow.node
        if self.name in ACTIVATIONS:
            return net.call(ACTIVATIONS[self.name], x)
        if self.name == "softmax":
            return net.call(aten.softmax.int, x, flow.shape.axis)
        if self.name == "square":
            return net.call(aten.pow.Tensor_Scalar, net.call(aten.relu.default, x), 2)
        if self.name == "clamp":
            return net.call(aten.clamp.default, x, -1.0, 1.0)
        if self.name == "where":
            return net.call(aten.where.self, net.call(aten.gt.Scalar, x, 0), x, net.call(aten.sin.default, x))
        return net.call(aten.prelu.default, x, net.parameter("slope", flow.shape.channels, like="scale"))


@dataclasses.dataclass(frozen=True)
class LayerScale(Layer):
    """A learned factor or offset per channel."""

    kind: str = "mul"

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> LayerScale:
        return cls(choices.of(("mul", "add", "div")))

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        vector = net.parameter("vector", flow.shape.channels, like="scale")
        if not flow.shape.last:
            vector = net.call(aten.view.default, vector, along(flow))
        node = net.call(getattr(aten, self.kind).Tensor, flow.node, vector)
        return flow.to(node, stream=net.written(flow.stream))


@dataclasses.dataclass(frozen=True)
class Ordered(Layer):
    """Something that gives channels an order: a scan, a rotation, a constant that varies."""

    kind: str = "cumsum"

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Ordered:
        return cls(choices.of(("cumsum", "flip", "roll", "ramp", "sort", "stride")))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(-(-shape.channels // 2)) if self.kind == "stride" else shape

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape, axis = self.result(flow.shape), flow.shape.axis
        node = self._call(net, flow, axis)
        flow.stream.lose()
        return Flow(node, shape, net.lost(shape.channels))

    def _call(self, net: NetworkGraph, flow: Flow, axis: int) -> fx.Node:
        x = flow.node
        if self.kind == "cumsum":
            return net.call(aten.cumsum.default, x, axis)
        if self.kind == "flip":
            return net.call(aten.flip.default, x, [axis])
        if self.kind == "roll":
            return net.call(aten.roll.default, x, [1], [axis])
        if self.kind == "sort":
            return net.items(net.call(aten.sort.default, x, axis))[0]
        if self.kind == "stride":
            return net.call(aten.slice.Tensor, x, axis, 0, flow.shape.channels, 2)
        ramp = torch.arange(flow.shape.channels, dtype=torch.float64) + 1
        return net.call(aten.mul.Tensor, x, net.constant("ramp", ramp.reshape(along(flow))))


# -- norms ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm(Layer):
    """A normalisation, with or without weights, written as an operator or by hand."""

    kind: str = "layer"
    affine: bool = False
    groups: int = 1

    KINDS: ClassVar[tuple[str, ...]] = (
        "layer",
        "batch",
        "rms",
        "group",
        "instance",
        "layer by hand",
        "rms by hand",
        "l2",
    )

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Norm:
        kinds = [kind for kind in cls.KINDS if kind != "instance" or math.prod(shape.positions) > 1]
        kind = choices.of(kinds)
        groups = choices.of([1, *divisors(shape.channels), shape.channels]) if kind == "group" else 1
        if kind == "group" and groups == shape.channels and math.prod(shape.positions) == 1:
            groups = 1
        return cls(kind, choices.flag(), groups)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        if self.kind in ("batch", "group", "instance"):
            return self._channels_first(net, flow)
        x = channels_last(net, flow)
        stream = net.written(flow.stream) if self.affine and self.kind != "l2" else flow.stream
        return flow.to(as_before(net, flow, self._over_last(net, x)), stream=stream)

    def _vectors(self, net: NetworkGraph, width: int) -> tuple[fx.Node | None, fx.Node | None]:
        if not self.affine:
            return None, None
        return net.parameter("weight", width, like="scale"), net.parameter("bias", width, like="bias")

    def _over_last(self, net: NetworkGraph, x: fx.Node) -> fx.Node:
        width = x.meta["val"].shape[-1]
        weight, bias = self._vectors(net, width)
        if self.kind == "layer":
            return net.call(aten.layer_norm.default, x, [width], weight, bias, EPSILON)
        if self.kind == "rms":
            return net.call(aten.rms_norm.default, x, [width], weight, EPSILON)
        if self.kind == "l2":
            length = net.call(aten.linalg_vector_norm.default, x, 2, [-1], True)
            result = net.call(aten.div.Tensor, x, net.call(aten.clamp_min.default, length, EPSILON))
        else:
            if self.kind == "layer by hand":
                x = net.call(aten.sub.Tensor, x, net.call(aten.mean.dim, x, [-1], True))
            mean = net.call(aten.mean.dim, net.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
            scale = net.call(aten.rsqrt.default, net.call(aten.add.Scalar, mean, EPSILON))
            result = net.call(aten.mul.Tensor, x, scale)
        if weight is not None and bias is not None:
            result = net.call(aten.add.Tensor, net.call(aten.mul.Tensor, result, weight), bias)
        return result

    def _channels_first(self, net: NetworkGraph, flow: Flow) -> Flow:
        turn = flow.shape.last and bool(flow.shape.positions)
        x = net.call(aten.transpose.int, flow.node, 1, 2) if turn else flow.node
        width = flow.shape.channels
        weight, bias = self._vectors(net, width)
        stream = net.written(flow.stream) if self.affine or self.kind == "batch" else flow.stream
        if self.kind == "batch":
            mean = net.parameter("running_mean", width, like="mean")
            variance = net.parameter("running_var", width, like="variance")
            x = net.call(aten.batch_norm.default, x, weight, bias, mean, variance, False, 0.1, EPSILON, False)
        elif self.kind == "instance":
            x = net.call(aten.instance_norm.default, x, weight, bias, None, None, True, 0.1, EPSILON, False)
        else:
            x = net.call(aten.group_norm.default, x, self.groups, weight, bias, EPSILON)
            if self.groups not in (1, width):
                net.factor(stream, [self.groups, width // self.groups])
        return flow.to(net.call(aten.transpose.int, x, 1, 2) if turn else x, stream=stream)


@dataclasses.dataclass(frozen=True)
class HeadView(Layer):
    """Channels viewed as (outer, inner), treated along one of the two, and flattened again."""

    outer: int = 2
    kind: str = "norm"

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and bool(divisors(shape.channels))

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> HeadView:
        return cls(
            choices.of(divisors(shape.channels)), choices.of(("norm", "softmax", "softmax outer", "mean"))
        )

    def result(self, shape: Shape) -> Shape:
        return shape.wide(self.outer) if self.kind == "mean" else shape

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        inner, shape = flow.shape.channels // self.outer, self.result(flow.shape)
        x = net.call(aten.unflatten.int, flow.node, -1, [self.outer, inner])
        factors = net.factor(flow.stream, [self.outer, inner])
        if self.kind == "mean":
            node = net.call(aten.mean.dim, x, [-1])
            return Flow(node, shape, Stream([factors[:1]]) if factors else net.lost(self.outer))
        if self.kind == "norm":
            weight = net.parameter("weight", inner, like="scale")
            x = net.call(aten.layer_norm.default, x, [inner], weight, None, EPSILON)
        else:
            x = net.call(aten.softmax.int, x, -2 if self.kind == "softmax outer" else -1)
        return flow.to(net.call(aten.flatten.using_ints, x, -2), shape)


# -- concatenation --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ZeroPad(Layer):
    """Channels padded with zeros."""

    before: int = 0
    after: int = 1

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.channels <= LARGEST_WIDTH // 2

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> ZeroPad:
        return cls(choices.of((0, 1, 2)), choices.of((1, 2, 3)))

    def result(self, shape: Shape) -> Shape:
        return shape.wide(shape.channels + self.before + self.after)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        skipped = [] if flow.shape.last else [0, 0] * len(flow.shape.positions)
        padding = [*skipped, self.before, self.after]
        node = net.call(aten.constant_pad_nd.default, flow.node, padding)
        inside = flow.stream.resolved()
        if not any(factor.free for part in inside for factor in part):
            return Flow(node, self.result(flow.shape), net.lost(self.result(flow.shape).channels))
        blanks = [[[Units(size, "blank")]] if size else [] for size in (self.before, self.after)]
        for blank in (part[0] for parts in blanks for part in parts):
            blank.padded = [factor for part in inside for factor in part]
        stream = Stream([*blanks[0], *inside, *blanks[1]], flow.stream.opaque)
        return Flow(node, self.result(flow.shape), stream)


@dataclasses.dataclass(frozen=True)
class Repeat(Layer):
    """Channels repeated, as a whole or one by one."""

    each: bool = False

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.channels <= LARGEST_WIDTH // 2

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Repeat:
        return cls(choices.flag())

    def result(self, shape: Shape) -> Shape:
        return shape.wide(2 * shape.channels)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        shape, axis = self.result(flow.shape), flow.shape.axis
        if self.each:
            node = net.call(aten.repeat_interleave.self_int, flow.node, 2, axis)
            return Flow(node, shape, net.times(flow.stream, Units(2, "blank")))
        times = [2 if place == axis else 1 for place in range(len(flow.shape.sizes))]
        node = net.call(aten.repeat.default, flow.node, times)
        parts = flow.stream.resolved()
        if len(parts) == 1 and not flow.stream.opaque:
            return Flow(node, shape, Stream([[Units(2, "blank"), *parts[0]]]))
        return Flow(node, shape, Stream([[factor for part in parts for factor in part]], opaque=True))
