"""Which transport reaches which parameter: the flow of a network, before anything is solved.

The graph is walked in order. A parameter that writes a stream of units gets a transport to be solved;
additions of a skip and a branch join two transports; everything else hands on what it was given, to the
parameters that it meets (biases, norms) and to those that read its result. Two transports that meet in any
other way, a gate times its signal or queries times keys, act on the same units and become one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import getitem

import torch
from torch import fx

from fxfusion.capture import Capture
from fxfusion.layout import Block
from fxfusion.plan import Plan
from fxfusion.rules.registry import operator_name
from fxfusion.statistics import NONLINEAR, Observation
from fxfusion.symmetry import reading_axes
from fxfusion.transport.map import axis_of, innermost
from fxfusion.transport.options import Flow, Heads, Nonlinearity, QueryKey, Tables

JOINS = frozenset(["add", "sub", "rsub", "lerp"])


@dataclasses.dataclass(frozen=True)
class Writer:
    """A parameter that writes a stream, and the node whose output shows what it wrote (empty: none)."""

    parameter: str
    node: str


@dataclasses.dataclass(eq=False)
class Solve:
    """A transport to be solved from what its writers write.

    Attributes
    ----------
    stream : str
        Name of the outermost of the spaces that are solved together; where heads are ignored, of the
        innermost.
    writers : list of Writer
    same : Solve or Join, optional
        What it was found to be the same as.
    joint : tuple of Solve, optional
        Itself and another, whose units are transported among each other: those of queries and of keys.
    """

    stream: str
    writers: list[Writer]
    same: Solve | Join | None = dataclasses.field(default=None, repr=False)
    joint: tuple[Solve, Solve] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(eq=False)
class Join:
    """The transports of a skip and a branch, to be combined.

    Attributes
    ----------
    stream : str
    skip, branch : Solve or Join
    nodes : tuple of str
        The nodes that hold the skip and the branch; an empty name for a parameter.
    """

    stream: str
    skip: Transport
    branch: Transport
    nodes: tuple[str, str]


Transport = Solve | Join


@dataclasses.dataclass(eq=False)
class Carried:
    """The transports of a network and where they arrive.

    Attributes
    ----------
    writing, reading : dict of (str, str) to Solve or Join
        By parameter and stream: what acts on the axes that write, or only read, the stream.
    last : dict of str to Solve or Join
        By stream: what its last node carries.
    made : list of Solve or Join
        In the order of the network, what a join needs before the join.
    """

    writing: dict[tuple[str, str], Transport] = dataclasses.field(default_factory=dict)
    reading: dict[tuple[str, str], Transport] = dataclasses.field(default_factory=dict)
    last: dict[str, Transport] = dataclasses.field(default_factory=dict)
    made: list[Transport] = dataclasses.field(default_factory=list)

    def transports(self) -> list[Transport]:
        """Return every transport once, what a join needs before the join."""
        return [transport for transport in self.made if settled(transport) is transport]

    def moved_by(self, transport: Transport) -> list[str]:
        """Return the parameters that a transport acts on where they write, in the order of the network."""
        return [name for (name, _), item in self.writing.items() if settled(item) is transport]

    def solve(self, stream: str, writers: list[Writer]) -> Solve:
        """Make a transport to be solved."""
        self.made.append(transport := Solve(stream, writers))
        return transport

    def join(self, stream: str, skip: Transport, branch: Transport, nodes: tuple[str, str]) -> Join:
        """Make a transport from two."""
        self.made.append(transport := Join(stream, skip, branch, nodes))
        return transport


def settled(transport: Transport) -> Transport:
    """Return what a transport was found to be the same as."""
    while isinstance(transport, Solve) and transport.same is not None:
        transport = transport.same
    return transport


class Streams:
    """What moves as one: a tree of spaces, or where heads are ignored every innermost space.

    Heads cannot be ignored where a parameter holds them without the dimensions below (a table of relative
    positions per head, keys whose dimensions rotary positions fix) or shares them between two axes (a
    grouped convolution): such a tree stays whole.

    Parameters
    ----------
    plan : Plan
    heads : Heads
    """

    def __init__(self, plan: Plan, heads: Heads) -> None:
        self.scopes = {space.name: space.scope for space in plan.spaces}
        self._above = {outer for scope in self.scopes.values() for outer in scope}
        self._roots = {
            space: next((outer for outer in scope if outer in self.scopes), space)
            for space, scope in self.scopes.items()
        }
        blocks = [block for layout in plan.layouts.values() for block in layout.blocks]
        if heads is Heads.IGNORED:
            self._whole = {self._roots[space] for block in blocks for space in self._inseparable(block)}
        else:
            self._whole = set(self._roots.values())

    def _inseparable(self, block: Block) -> Iterator[str]:
        """Yield spaces that cannot be solved without their outer units, as this block holds them."""
        met: set[int] = set()
        for space, _, scope in innermost(block, self.scopes):
            if space in self._above or met & set(scope):
                yield space
            met |= set(scope)

    def of(self, space: str) -> str | None:
        """Return the stream of a space, or None for one whose units are told apart below it."""
        if self._roots[space] in self._whole:
            return self._roots[space]
        return space if space not in self._above else None

    def is_whole(self, stream: str) -> bool:
        """Return whether a stream is solved as a tree of spaces."""
        return stream in self._whole

    def is_nested(self, stream: str) -> bool:
        """Return whether several spaces are solved together."""
        return stream in self._whole and stream in self._above

    def in_block(self, block: Block) -> Iterator[tuple[str, str, int, list[int]]]:
        """Yield stream, space, dimension and outer dimensions of the innermost spaces of a block."""
        for space, dimension, scope in innermost(block, self.scopes):
            stream = self.of(space)
            if stream is not None:
                yield stream, space, dimension, scope

    def observations(self, plan: Plan, graph: fx.Graph) -> Iterator[tuple[str, str, Observation]]:
        """Yield streams and spaces wherever they can be observed, in the order of the network."""
        for node in graph.nodes:
            for block in plan.activations.get(node.name, ()):
                for space, observation in Observation.all_of(node.name, block, self.scopes):
                    stream = self.of(space)
                    if stream is not None:
                        yield stream, space, observation


def carry(capture: Capture, plan: Plan, options: Flow) -> Carried:
    """Follow every transport through a network.

    Parameters
    ----------
    capture : Capture
    plan : Plan
    options : Flow
        Residual policies do not matter here.

    Returns
    -------
    Carried
    """
    walk = _Walk(capture, plan, options)
    for node in capture.module.graph.nodes:
        walk.visit(node)
    if options.nonlinearity is Nonlinearity.AFTER:
        nodes = {node.name: node for node in capture.module.graph.nodes}
        for transport in walk.carried.made:
            if isinstance(transport, Solve):
                transport.writers = [
                    dataclasses.replace(item, node=_activated(nodes[item.node], walk.at, transport.stream))
                    if item.node
                    else item
                    for item in transport.writers
                ]
    return walk.carried


def _activated(node: fx.Node, at: Mapping[fx.Node, Mapping[str, Transport]], stream: str) -> str:
    """Return the nonlinearity that a node's output alone goes through, or the node itself."""
    item = node
    while len(item.users) == 1:
        item = next(iter(item.users))
        if stream not in at.get(item, ()) or sum(is_tensor(part) for part in item.all_input_nodes) != 1:
            break
        if operator_name(item.target) in NONLINEAR:
            return item.name
    return node.name


class _Walk:
    def __init__(self, capture: Capture, plan: Plan, options: Flow) -> None:
        assert isinstance(options.heads, Heads)
        self.capture = capture
        self.plan = plan
        self.options = options
        self.streams = Streams(plan, options.heads)
        self.carried = Carried()
        self.at: dict[fx.Node, dict[str, Transport]] = {}  # by node and stream
        self.origins: dict[fx.Node, frozenset[str]] = {}  # of what is made of parameters alone
        self.spaces: dict[fx.Node, set[str]] = {}
        self.depth: dict[fx.Node, int] = {}  # number of nodes that a node is computed from, as a bit set
        self.writes: dict[str, set[str]] = {}  # parameter -> streams on axes that do not only read
        self.written: dict[str, set[str]] = {}  # and the spaces there
        self.reads: dict[str, set[str]] = {}
        self.tables: dict[tuple[str, str], bool] = {}
        reading = reading_axes(plan)
        for name, layout in plan.layouts.items():
            for block in layout.blocks:
                for stream, space, dimension, scope in self.streams.in_block(block):
                    only_read = axis_of(block, dimension) in reading.get(name, frozenset())
                    (self.reads if only_read else self.writes).setdefault(name, set()).add(stream)
                    if not only_read:
                        self.written.setdefault(name, set()).add(space)
                    others = [
                        factor.size
                        for place, factor in enumerate(block.factors)
                        if place not in (*scope, dimension)
                    ]
                    self.tables[name, stream] = any(size > 1 for size in others)

    def visit(self, node: fx.Node) -> None:
        """Find what a node carries."""
        self.depth[node] = 1 << len(self.depth)
        for item in node.all_input_nodes:
            self.depth[node] |= self.depth[item]
        if node.op == "get_attr":
            name = self.capture.aliases.get(str(node.target), str(node.target))
            self.origins[node] = frozenset([name] if name in self.plan.layouts else [])
            return
        if node.op != "call_function":
            return
        operands, operator = node.all_input_nodes, operator_name(node.target)
        if node.target is getitem and operands:  # one output of an operator with several
            operator = operator_name(operands[0].target)
            operands = operands[0].all_input_nodes
        if all(item in self.origins or not is_tensor(item) for item in operands):
            self.origins[node] = frozenset().union(*(self.origins.get(item, ()) for item in operands))
            return
        parameters = [name for item in operands for name in sorted(self.origins.get(item, ()))]
        held = self._held(node)
        for stream in held:
            self._carry(node, stream, operator, operands, parameters)
        given = [self.at[item] for item in operands if item in self.at]
        for name in parameters:
            for stream in self.reads.get(name, ()):
                for arrived in given:
                    if stream in arrived:
                        self.carried.reading.setdefault((name, stream), arrived[stream])
        for stream in {stream: None for arrived in given for stream in arrived if stream not in held}:
            arriving = [arrived[stream] for arrived in given if stream in arrived]
            apart = self.options.query_key is QueryKey.SEPARATE and not self.streams.is_whole(stream)
            if len(arriving) > 1 and not apart and not self._put_together(stream, arriving):
                self._identify(arriving)

    def _held(self, node: fx.Node) -> list[str]:
        """Return the streams that a node's output holds."""
        found: dict[str, None] = {}
        for block in self.plan.activations.get(node.name, ()):
            for stream, space, *_ in self.streams.in_block(block.bind(block.sizes)):
                found[stream] = None
                self.spaces.setdefault(node, set()).add(space)
        return list(found)

    def _carry(
        self,
        node: fx.Node,
        stream: str,
        operator: str,
        operands: Sequence[fx.Node],
        parameters: Sequence[str],
    ) -> None:
        arriving = {
            item: settled(self.at[item][stream]) for item in operands if stream in self.at.get(item, ())
        }
        met = [name for name in parameters if stream in self.writes.get(name, ())]
        if not arriving:
            self._write(node, stream, met)
            return
        carried = next(iter(arriving.values()))
        if len(set(map(id, arriving.values()))) > 1:
            carried = self._meet(stream, operator, arriving)
        before = {space for item in operands for space in self.spaces.get(item, ())}
        for name in met:
            carried = self._follow(name, stream, operator, carried, node)
            root = settled(carried)
            anew = self.written[name] - before and self.streams.is_nested(stream)
            if anew and isinstance(root, Solve) and all(item.parameter != name for item in root.writers):
                root.writers.append(Writer(name, node.name))
        self._set(node, stream, carried)

    def _write(self, node: fx.Node, stream: str, parameters: Sequence[str]) -> None:
        """Begin a transport, or go on with the one that a parameter has already."""
        if not parameters:
            if stream in self.carried.last:  # it came through a node whose units are not known
                self._set(node, stream, self.carried.last[stream])
            return
        written = self.carried.writing
        known = [written[name, stream] for name in parameters if (name, stream) in written]
        transport = known[0] if known else self.carried.solve(stream, [])
        root = settled(transport)
        for name in parameters:
            if (name, stream) not in self.carried.writing:
                self.carried.writing[name, stream] = transport
                if isinstance(root, Solve):
                    root.writers.append(Writer(name, node.name))
        self._set(node, stream, root)

    def _set(self, node: fx.Node, stream: str, carried: Transport) -> None:
        self.at.setdefault(node, {})[stream] = self.carried.last[stream] = carried

    def _follow(self, name: str, stream: str, operator: str, carried: Transport, node: fx.Node) -> Transport:
        """Let a parameter that meets a stream follow it, or join it as a table of its own."""
        if (name, stream) in self.carried.writing:
            return carried
        own = self.options.tables is Tables.OWN and self._is_table(name, stream, operator)
        if not own:
            self.carried.writing[name, stream] = carried
            return carried
        table = self.carried.solve(stream, [Writer(name, "")])
        self.carried.writing[name, stream] = table
        if operator not in JOINS:
            return carried
        branch = next(item.name for item in node.all_input_nodes if stream in self.at.get(item, ()))
        return self.carried.join(stream, table, carried, ("", branch))

    def _is_table(self, name: str, stream: str, operator: str) -> bool:
        """Whether a parameter is put before a stream, or added as a table; heads' tables follow theirs."""
        if self.streams.is_nested(stream):
            return False
        return operator in ("cat", "concat") or (operator in JOINS and self.tables[name, stream])

    def _meet(self, stream: str, operator: str, arriving: dict[fx.Node, Transport]) -> Transport:
        if operator not in JOINS or self.streams.is_nested(stream):
            carried = self._identify(list(arriving.values()))
            if carried is not None:
                return carried
        # The skip is computed from less than the branch that goes around it.
        nodes = sorted(arriving, key=lambda item: self.depth[item].bit_count())
        carried = arriving[nodes[0]]
        before = nodes[0]
        for item in nodes[1:]:
            if arriving[item] is not carried:
                carried = self.carried.join(stream, carried, arriving[item], (before.name, item.name))
            before = item
        return carried

    def _put_together(self, stream: str, transports: Sequence[Transport]) -> bool:
        """Let two transports be solved over the units of both, if that is asked for and possible."""
        if self.options.query_key is not QueryKey.JOINT or self.streams.is_whole(stream):
            return False
        distinct = list({id(item): item for item in map(settled, transports)}.values())
        pair = [item for item in distinct if isinstance(item, Solve)]
        if len(pair) != 2 or len(distinct) != 2:
            return False
        pair.sort(key=self.carried.made.index)
        if pair[0].joint is not None or pair[1].joint is not None:
            return pair[0].joint == tuple(pair)
        first, second = (self.carried.moved_by(item) for item in pair)
        layouts = self.plan.layouts
        if [layouts[name].shape for name in first] != [layouts[name].shape for name in second]:
            return False
        for item in pair:
            item.joint = pair[0], pair[1]
        return True

    def _identify(self, transports: Iterable[Transport]) -> Transport | None:
        """Make transports one; None if they are joins of different things."""
        distinct = _with_partners(map(settled, transports))
        joins = [item for item in distinct if isinstance(item, Join)]
        if len(joins) > 1:
            return None
        kept = joins[0] if joins else distinct[0]
        for item in distinct:
            if item is kept or not isinstance(item, Solve):
                continue
            if _contains(kept, item):
                return None
            item.joint = None  # one transport of more than two is none of two
            if isinstance(kept, Solve):
                kept.joint = None
                kept.writers += item.writers
            item.same = kept
        return kept


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is more than a size of the batch, which a parameter may be expanded by."""
    value = node.meta.get("val")
    return value is None or isinstance(value, (torch.Tensor, list, tuple))


def _with_partners(transports: Iterable[Transport]) -> list[Transport]:
    """Return transports once each, and then those that are solved together with them."""
    found = {id(item): item for item in transports}
    for item in list(found.values()):
        if isinstance(item, Solve) and item.joint is not None and len(found) > 1:
            found.update({id(other): other for other in item.joint})
    return list(found.values())


def _contains(transport: Transport, part: Transport) -> bool:
    """Whether a transport is made of another."""
    seen: set[int] = set()
    pending = [settled(transport)]
    while pending:
        item = pending.pop()
        if item is part:
            return True
        if isinstance(item, Join) and id(item) not in seen:
            seen.add(id(item))
            pending += [settled(item.skip), settled(item.branch)]
    return False
