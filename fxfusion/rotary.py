"""Rotary positions: where a graph turns pairs of dimensions by angles that depend on the position alone.

Queries and keys are turned before they are multiplied (Su et al., RoFormer, 2021). Written out, that is an
element-wise product with tables that vary along the dimensions, so that inference fixes them. But a rotation
of a pair of dimensions commutes with every other rotation of that pair: one angle per pair is free, in
queries and keys alike.

Nothing here knows how a model writes it. A part of the graph between two nodes of one shape that is made of
products with constants, sums, and what moves elements about is a linear map, the same for all samples. It is
run on unit vectors, which says what pairs of dimensions meet, and on random ones: where it commutes with all
rotations of these pairs, the part is taken as one operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.capture import Capture, attribute, hint, is_real
from fxfusion.holding import METADATA, sizes_of
from fxfusion.plan import Rotary
from fxfusion.rules.registry import operator_name
from fxfusion.transport.rotation import turn

_ENDS = frozenset(["add", "sub", "cat", "stack", "view", "reshape", "_unsafe_view", "flatten"])
_MOVING = frozenset(
    [
        *("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "cat", "stack", "neg"),
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
        *("to", "_to_copy", "clone", "contiguous", "alias", "index_select", "roll"),
    ]
)
_LARGEST = 40  # nodes
_WIDEST = 1024  # dimensions
_ROUNDS = 8
_TOLERANCE = 1e-5


def rotary_parts(capture: Capture) -> tuple[Rotary, ...]:
    """Find the parts of a graph that turn pairs of dimensions.

    Parameters
    ----------
    capture : Capture

    Returns
    -------
    tuple of Rotary
        In the graph's order. Empty where tables of angles depend on inputs, or have no values.

    Examples
    --------
    >>> import fxfusion.capture
    >>> class Turned(torch.nn.Module):
    ...     def forward(self, x):
    ...         angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    ...         halves = torch.cat([-x[..., 2:], x[..., :2]], -1)
    ...         return x * angles.cos() + halves * angles.sin()
    >>> [part.planes for part in rotary_parts(fxfusion.capture.capture(Turned(), (torch.ones(2, 3, 4),)))]
    [((0, 2), (1, 3))]
    """
    return tuple(_Search(capture).found())


class _Search:
    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.order = {node: index for index, node in enumerate(capture.module.graph.nodes)}
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[Any, tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None] = {}
        self.changing = self._changing()

    def _changing(self) -> set[fx.Node]:
        """Return what depends on inputs or parameters, other than by their sizes."""
        found: set[fx.Node] = set()
        for node in self.order:
            named = self.capture.aliases.get(str(node.target), str(node.target)) in self.capture.parameters
            if (
                node.op == "placeholder"
                or (node.op == "get_attr" and named)
                or (operator_name(node.target) not in METADATA and found.intersection(node.all_input_nodes))
            ):
                found.add(node)
        return found

    def found(self) -> Iterator[Rotary]:
        taken: set[fx.Node] = set()
        for node in self.order:
            if node in self.changing and operator_name(node.target) in _ENDS and node not in taken:
                part = self._part(node)
                if part is not None and not taken.intersection(part[1]):
                    source, nodes = part
                    turned = self._turned(source, nodes)
                    if turned is not None:
                        taken.update(nodes)
                        inner = frozenset(item.name for item in nodes)
                        yield Rotary(source.name, node.name, inner, *turned)

    def _part(self, last: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
        """Return the smallest linear part that ends in a node, and the node that it begins after."""
        pending, mixed = {last}, False
        nodes: list[fx.Node] = []
        while len(nodes) < _LARGEST:
            node = max(pending, key=self.order.__getitem__)
            if len(pending) == 1 and mixed and node is not last and _shape(node) == _shape(last):
                break
            pending.remove(node)
            operands = [item for item in node.all_input_nodes if item in self.changing and _is_tensor(item)]
            if not self._is_linear(node, operands):
                return None
            mixed |= operator_name(node.target) == "mul"
            nodes.append(node)
            pending.update(operands)
        else:
            return None
        nodes.reverse()
        apart = set(nodes[:-1])
        readers = {
            user for item in apart for user in item.users if operator_name(user.target) not in METADATA
        }
        return (node, nodes) if readers <= set(nodes) else None

    def _is_linear(self, node: fx.Node, operands: Sequence[fx.Node]) -> bool:
        if node.op != "call_function" or not operands:
            return False
        operator = operator_name(node.target)
        if operator == "mul":
            return len(operands) == 1 and node.args.count(operands[0]) == 1
        if operator in ("add", "sub"):
            given = [item for item in node.args[:2] if item in self.changing]
            return len(given) == 2 and len(node.args) == 2 and not node.kwargs
        return operator in _MOVING or node.target is getitem

    # -- what it does -----------------------------------------------------------------------------

    def _turned(
        self, source: fx.Node, nodes: Sequence[fx.Node]
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
        """Return the pairs of dimensions that a part turns, and along which axes; None if it does not."""
        key = self._signature(source, nodes)
        if key not in self.known:
            self.known[key] = self._measured(source, nodes)
        return self.known[key]

    def _signature(self, source: fx.Node, nodes: Sequence[fx.Node]) -> Any:
        """Return what parts have in common that do the same to tensors of one shape."""
        numbers = {item: index for index, item in enumerate([source, *nodes])}

        def told(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return ("node", numbers.get(item, item.name))
            return repr(item)

        told_all = [
            (str(node.target), tuple(map(told, pytree.tree_leaves((node.args, node.kwargs)))))
            for node in nodes
        ]
        return _shape(source), tuple(told_all)

    def _measured(
        self, source: fx.Node, nodes: Sequence[fx.Node]
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
        shape = _shape(source)
        if not shape or not 2 <= shape[-1] <= _WIDEST:
            return None
        try:
            planes = self._meeting(source, nodes, shape)
            if planes is None:
                return None
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            angles = torch.rand(*shape[:-1], len(planes), generator=generator, dtype=torch.float64)
            angles *= 2 * torch.pi
            # It must commute with rotations of its pairs that differ from place to place.
            after = turn(self._run(source, nodes, drawn), angles, planes)
            before = self._run(source, nodes, turn(drawn, angles, planes))
            if not torch.allclose(before, after, atol=_TOLERANCE):
                return None
            varying = []
            for axis in range(len(shape) - 1):
                found = self._run(source, nodes, drawn.narrow(axis, 0, 1).expand(shape))
                if not torch.allclose(found, found.narrow(axis, 0, 1), atol=_TOLERANCE):
                    varying.append(axis)
        except (_UnknownError, RuntimeError, TypeError, ValueError, IndexError):
            return None
        return planes, tuple(varying)

    def _meeting(
        self, source: fx.Node, nodes: Sequence[fx.Node], shape: tuple[int, ...]
    ) -> tuple[tuple[int, int], ...] | None:
        """Return the pairs of dimensions that meet; None if any meets more than one other, or none.

        Unit vectors lie side by side along the other axes, each at several places: not all angles are zero.
        """
        size, places = shape[-1], math.prod(shape[:-1])
        rounds = min(max(_ROUNDS, 4 * size // places), size)
        stride = size // rounds | 1
        met = torch.zeros(size, size, dtype=torch.int64)
        for number in range(rounds):
            which = (torch.arange(places) + number * stride) % size
            units = torch.nn.functional.one_hot(which, size).double().reshape(shape)
            met.index_add_(0, which, (self._run(source, nodes, units) != 0).reshape(places, size).long())
        met.fill_diagonal_(0)
        partners, alone = met.argmax(-1), torch.arange(size)
        if not bool(((met > 0).sum(-1) == 1).all()) or not torch.equal(partners[partners], alone):
            return None
        return tuple((index, int(other)) for index, other in enumerate(partners) if index < other)

    def _run(self, source: fx.Node, nodes: Sequence[fx.Node], value: torch.Tensor) -> torch.Tensor:
        values: dict[fx.Node, Any] = {source: value}
        for node in nodes:
            values[node] = self._called(node, values)
        result: torch.Tensor = values[nodes[-1]]
        return result.double()

    def _called(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if operator_name(node.target) in ("to", "_to_copy"):  # in one precision throughout
            return values[node.args[0]] if node.args[0] in values else self._constant(node.args[0])  # type: ignore[index, arg-type]
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda item: values[item] if item in values else self._constant(item)
        )
        target: Any = node.target
        return target(*args, **kwargs)

    def _constant(self, node: fx.Node) -> Any:
        """Return the value of a node that depends on sizes alone, those of the example."""
        pending = [node]
        while pending:
            item = pending[-1]
            value = item.meta.get("val")
            if item in self.values:
                pending.pop()
            elif hint(value) is not value:
                self.values[item] = hint(value)
            elif item.op == "get_attr" and item not in self.changing:
                self.values[item] = found = attribute(self.capture.module, str(item.target))
                if isinstance(found, torch.Tensor) and not is_real(found):
                    raise _UnknownError
            elif item.op != "call_function" or item in self.changing or "rand" in str(item.target):
                raise _UnknownError
            elif missing := [other for other in item.all_input_nodes if other not in self.values]:
                pending += missing
            else:
                args, kwargs = fx.map_arg((item.args, item.kwargs), self.values.__getitem__)
                target: Any = item.target
                self.values[item] = target(*args, **kwargs)
        return self.values[node]


class _UnknownError(Exception):
    """A value is not known before the graph runs."""


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a tensor of real numbers on the example; none of what is no such tensor."""
    value = node.meta.get("val")
    real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return tuple(sizes_of(node)) if real else ()


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
