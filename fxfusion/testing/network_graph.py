"""Build the graph of a network layer by layer, and keep account of the units that must stay free.

The account is deliberately simple and independent of inference: a stream (the channels between two layers)
is a concatenation of row-major products of :class:`Units`. Where a layer does something that the account
does not follow, the units it touches are *lost*: no longer counted on, whatever inference finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.capture import Capture

BATCH = 2
MEMORY_LENGTH, MEMORY_WIDTH = 4, 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of what flows between layers, without its batch.

    Attributes
    ----------
    channels : int
    positions : tuple of int
        Empty for vectors, one length for tokens and signals, height and width for images.
    last : bool
        Whether channels are the last axis (vectors, tokens) or the first after the batch.
    """

    channels: int
    positions: tuple[int, ...] = ()
    last: bool = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of all axes with the batch."""
        if self.last:
            return (BATCH, *self.positions, self.channels)
        return (BATCH, self.channels, *self.positions)

    @property
    def axis(self) -> int:
        """The channel axis."""
        return len(self.positions) + 1 if self.last else 1

    def wide(self, channels: int) -> Shape:
        """Return the shape with another number of channels."""
        return dataclasses.replace(self, channels=channels)


# -- the account of free units --------------------------------------------------------------------


class Units:
    """Some units of a network: free, lost (fixed or not followed), or blank (a repeated value)."""

    def __init__(self, size: int, kind: str = "free") -> None:
        self.size = size
        self.kind = kind
        self.bound: list[list[Units]] | None = None
        self.padded: list[Units] = []  # units that must be free for these to be: what zeros were put beside

    @property
    def counts(self) -> bool:
        """Whether inference must find a free space here."""
        return self.bound is None and self.free

    @property
    def free(self) -> bool:
        """Whether some of the units, as refined by now, are free."""
        if self.bound is not None:
            return any(factor.free for part in self.bound for factor in part)
        if self.kind != "free" or self.size < 2 or not self.padded:
            return self.kind == "free" and self.size > 1
        beside, self.padded = self.padded, []  # what is padded may become a part of itself
        found = any(units.free for units in beside)
        self.padded = beside
        return found

    def lose(self) -> None:
        """Count on these units no longer."""
        self.kind = "lost" if self.kind == "free" else self.kind
        for part in self.bound or ():
            for factor in part:
                factor.lose()


@dataclasses.dataclass(eq=False)
class Stream:
    """A concatenation of products of units. An opaque one is only looked at and lost as a whole."""

    parts: list[list[Units]]
    opaque: bool = False

    def resolved(self) -> list[list[Units]]:
        """Return the parts as refined by now; opaque if a concatenation lies below a product."""
        found: list[list[Units]] = []
        for part in self.parts:
            below = [_expand(factor) for factor in part]
            self.opaque = self.opaque or any(stream.opaque for stream in below)
            expanded = [stream.parts for stream in below]
            if len(expanded) == 1:
                found += expanded[0]
            elif all(len(item) == 1 for item in expanded):
                found.append(_joined([factor for item in expanded for factor in item[0]]))
            else:
                self.opaque = True
                found.append([factor for item in expanded for inner in item for factor in inner])
        return found

    def lose(self) -> None:
        """Count on nothing here any longer."""
        for part in self.parts:
            for factor in part:
                factor.lose()
        self.opaque = True

    @property
    def followed(self) -> list[list[Units]] | None:
        """The parts, or None for an opaque stream, whose units are lost by being asked for."""
        parts = self.resolved()
        if not self.opaque:
            return parts
        self.lose()
        return None


def _expand(units: Units) -> Stream:
    """Return what units have become."""
    if units.bound is None:
        return Stream([[units]])
    stream = Stream(units.bound)
    return Stream(stream.resolved(), stream.opaque)


def _joined(factors: Sequence[Units]) -> list[Units]:
    """Let blanks with at most single units between them be one: what is repeated has no structure."""
    found: list[Units] = []
    for factor in [factor for factor in factors if factor.size > 1] or factors[:1]:
        if found and found[-1].kind == factor.kind == "blank":
            found[-1] = Units(found[-1].size * factor.size, "blank")
        else:
            found.append(factor)
    return found


def _representative(units: Units) -> Units:
    """Follow units that became others, up to those that became several."""
    while units.bound is not None and len(units.bound) == len(units.bound[0]) == 1:
        units = units.bound[0][0]
    return units


def _sizes(parts: Sequence[Sequence[Units]]) -> list[list[int]]:
    return [[factor.size for factor in part] for part in parts]


def _volume(part: Sequence[Units]) -> int:
    volume = 1
    for factor in part:
        volume *= factor.size
    return volume


# -- the graph ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Flow:
    """What flows between two layers."""

    node: fx.Node
    shape: Shape
    stream: Stream

    def to(self, node: fx.Node, shape: Shape | None = None, stream: Stream | None = None) -> Flow:
        """Return what flows on."""
        return Flow(node, shape or self.shape, stream or self.stream)


class NetworkGraph:
    """A graph under construction.

    Every operator is run as it is entered, on random float64 weights. A parameter is named after the layer
    that asks for it (``path``), so that a layer entered twice shares its parameters and its units.

    Parameters
    ----------
    seed : int
        Draws weights and inputs.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.state: dict[str, torch.Tensor] = {}
        self.constants: list[str] = []
        self.inputs: list[torch.Tensor] = []
        self.units: list[Units] = []
        self.path = ""
        self._first: fx.Node | None = None
        self._memory: fx.Node | None = None
        self._nodes: dict[str, fx.Node] = {}
        self._named: dict[str, Units] = {}
        self._entered: dict[str, Stream] = {}

    # -- nodes ----------------------------------------------------------------------------------

    def normal(self, *shape: int) -> torch.Tensor:
        """Return random numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def input(self, tensor: torch.Tensor) -> fx.Node:
        """Enter an input."""
        node = self.graph.placeholder(f"input{len(self.inputs)}")
        self._first = self._first or node
        self.inputs.append(tensor)
        return self._known(node, tensor)

    def parameter(self, name: str, *shape: int, like: str = "weight") -> fx.Node:
        """Enter a parameter of the current layer, or return it if the layer was entered before.

        Parameters
        ----------
        name : str
        *shape : int
        like : {"weight", "bias", "scale", "mean", "variance"}
            What it stands for, which says what values it gets.
        """
        path = f"{self.path}.{name}"
        if path not in self._nodes:
            self.state[path] = self._values(shape, like)
            self._nodes[path] = self._attribute(path, self.state[path], buffer=like in ("mean", "variance"))
        return self._nodes[path]

    @property
    def memory(self) -> fx.Node:
        """The second input, to which cross-attention attends."""
        if self._memory is None:
            assert self._first is not None, "a network begins with an input"
            with self.graph.inserting_after(self._first):
                self._memory = self.input(self.normal(BATCH, MEMORY_LENGTH, MEMORY_WIDTH))
        return self._memory

    def tied(self, path: str) -> fx.Node:
        """Return a parameter by its full name."""
        return self._nodes[path]

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Enter a tensor that is neither parameter nor input."""
        path = f"{self.path}.{name}"
        if path not in self._nodes:
            self.constants.append(path)
            self._nodes[path] = self._attribute(path, tensor, buffer=True)
        return self._nodes[path]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Enter a call of an operator."""
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda item: item.meta["val"])
        with torch.no_grad():
            return self._known(node, target(*values, **named))

    def items(self, node: fx.Node) -> list[fx.Node]:
        """Return the outputs of an operator that has several."""
        count = len(node.meta["val"])
        return [self.call(operator.getitem, node, index) for index in range(count)]

    def _values(self, shape: tuple[int, ...], like: str) -> torch.Tensor:
        drawn = self.normal(*shape)
        if like == "weight":
            fan_in = max(1, torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0])
            return drawn * 1.4 / fan_in**0.5
        return drawn.abs() * 0.3 + 0.6 if like in ("scale", "variance") else drawn * 0.3

    def _attribute(self, path: str, tensor: torch.Tensor, buffer: bool) -> fx.Node:
        owner, _, name = path.rpartition(".")
        module = self.root
        for step in owner.split("."):
            if not hasattr(module, step):
                module.add_module(step, torch.nn.Module())
            module = cast(torch.nn.Module, getattr(module, step))
        if buffer:
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return self._known(self.graph.get_attr(path), tensor)

    def _known(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        return node

    # -- layers ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def within(self, step: str) -> Iterator[None]:
        """Name what is entered inside after a step of the path."""
        before = self.path
        self.path = f"{before}.{step}" if before else step
        try:
            yield
        finally:
            self.path = before

    def run(self, layers: Sequence[Any], flow: Flow) -> Flow:
        """Enter layers one after the other."""
        for index, layer in enumerate(layers):
            with self.within(f"{index}"):
                if self.path in self._entered:
                    self.merge(self._entered[self.path], flow.stream)
                self._entered[self.path] = flow.stream
                flow = layer.apply(self, flow)
        return flow

    # -- units ----------------------------------------------------------------------------------

    def space(self, name: str, size: int) -> Units:
        """Return units of the current layer that must stay free."""
        path = f"{self.path}.{name}"
        if path not in self._named:
            self._named[path] = self._new(size, "free")
        return self._named[path]

    def stream(self, name: str, size: int) -> Stream:
        """Return a stream of new units of the current layer."""
        return Stream([[self.space(name, size)]])

    def _new(self, size: int, kind: str) -> Units:
        units = Units(size, kind)
        self.units.append(units)
        return units

    def merge(self, left: Stream, right: Stream) -> Stream:
        """Let two streams be one, as an addition does."""
        first, second = left.followed, right.followed
        if first is None or second is None:
            left.lose()
            right.lose()
            return left
        if len(first) == len(second) and list(map(_volume, first)) == list(map(_volume, second)):
            pairs = [self._merge_parts(*pair) for pair in zip(first, second, strict=True)]
            if all(pair is not None for pair in pairs):
                return Stream([pair for pair in pairs if pair is not None])
        for whole, other in ((first, second), (second, first)):
            if _sizes(whole) == [[_volume(whole[0])]]:
                return self._bind(whole[0][0], other)
        left.lose()
        right.lose()
        return left

    def _bind(self, units: Units, parts: list[list[Units]]) -> Stream:
        """Refine units; what was blank gets units of its own."""
        units = _representative(units)
        if parts == [[units]]:
            return Stream(parts)
        if units.bound is not None or any(units is factor for part in parts for factor in part):
            Stream(parts).lose()
            units.lose()
            return Stream(parts)
        if units.kind == "blank":
            return Stream(parts)
        filled = [[self._filled(factor) for factor in part] for part in parts]
        units.bound = filled
        if units.kind == "lost":
            units.lose()
            for part in filled:
                for factor in part:
                    factor.lose()
        return Stream(filled)

    def written(self, stream: Stream) -> Stream:
        """Return a stream after a parameter wrote it: what was repeated before has units of its own."""
        if stream.opaque:
            return stream
        return Stream([[self._filled(factor) for factor in part] for part in stream.resolved()])

    def _filled(self, units: Units) -> Units:
        if units.kind != "blank":
            return units
        filled = self._new(units.size, "free")
        filled.padded = units.padded
        return filled

    def _merge_parts(self, left: list[Units], right: list[Units]) -> list[Units] | None:
        if _sizes([left]) == _sizes([right]):
            return [self._merge_units(*pair) for pair in zip(left, right, strict=True)]
        for whole, other in ((left, right), (right, left)):
            if len(whole) == 1:
                return self._bind(whole[0], [other]).parts[0]
        return None

    def _merge_units(self, left: Units, right: Units) -> Units:
        left, right = _representative(left), _representative(right)
        if left.bound is not None or right.bound is not None:  # refined since this merge began
            left.lose()
            right.lose()
            return left
        if left is right or right.kind == "blank":
            return left
        if left.kind == "blank":
            return right
        if "lost" in (left.kind, right.kind):
            left.lose()
            right.lose()
        right.bound = [[left]]
        return left

    def factor(self, stream: Stream, sizes: Sequence[int]) -> list[Units] | None:
        """Refine a stream to a product of ``sizes``; None, and lost, if the account does not follow."""
        parts = stream.followed
        sizes = [size for size in sizes if size > 1] or [1]
        if parts is None:
            return None
        if len(parts) == 1 and [factor.size for factor in parts[0] if factor.size > 1] == sizes:
            return [factor for factor in parts[0] if factor.size > 1]
        if len(parts) == 1 and len(parts[0]) == 1:
            whole = parts[0][0]
            factors = [self._new(size, whole.kind) for size in sizes]
            whole.bound = [factors]
            return factors
        if len(parts) == 1 and len(sizes) == 2 and parts[0][0].size == sizes[0] and sizes[0] > 1:
            return parts[0]
        stream.lose()
        return None

    def cut(self, stream: Stream, position: int) -> tuple[Stream, Stream]:
        """Part a stream in two."""
        parts = stream.followed
        if parts is None:
            return stream, stream
        taken: list[list[Units]] = []
        rest = list(parts)
        while rest and position >= _volume(rest[0]):
            position -= _volume(rest[0])
            taken.append(rest.pop(0))
        if position:
            if len(rest[0]) > 1:
                stream.lose()
                return stream, stream
            whole = rest.pop(0)[0]
            pieces = [self._new(size, whole.kind) for size in (position, whole.size - position)]
            whole.bound = [[piece] for piece in pieces]
            taken.append([pieces[0]])
            rest.insert(0, [pieces[1]])
        return Stream(taken), Stream(rest)

    @staticmethod
    def times(stream: Stream, inner: Units) -> Stream:
        """Return a stream with another factor innermost."""
        parts = stream.resolved()
        if inner.size == 1:
            return stream
        if len(parts) == 1 and not stream.opaque:
            return Stream([[*parts[0], inner]])
        return Stream([[*(factor for part in parts for factor in part), inner]], opaque=True)

    @staticmethod
    def lost(size: int) -> Stream:
        """Return a stream of which nothing is expected."""
        return Stream([[Units(size, "lost")]])

    @property
    def expected(self) -> int:
        """How many free spaces inference must find, at least."""
        return sum(units.counts for units in self.units)

    # -- the result -----------------------------------------------------------------------------

    def finish(self, outputs: Sequence[fx.Node]) -> Capture:
        """Close the graph and return it as a captured model.

        Its module carries the graph without code for it: that takes longer than everything else here.
        """
        self.graph.output(list(outputs))
        module = cast(fx.GraphModule, self.root)
        object.__setattr__(module, "graph", self.graph)
        object.__setattr__(module, "_in_spec", pytree.tree_structure((tuple(self.inputs), {})))
        return Capture(
            module=module,
            name="Network",
            args=tuple(self.inputs),
            kwargs={},
            parameters={name: tuple(tensor.shape) for name, tensor in self.state.items()},
            aliases={},
            constants=frozenset(self.constants),
            unused=(),
            inputs=tuple(f"input{index}" for index in range(len(self.inputs))),
            outputs=tuple(f"output{index}" for index in range(len(outputs))),
            dynamic=False,
        )
