"""Two networks of one structure and other widths: which unit sets of one are those of the other.

Both are captured and planned on their own. Their graphs must correspond node by node and their spaces by
name, scope and place; what is fixed must have equal size. Then every transport is a rectangular coupling,
and the aligned source has the target's shapes.

Averaging groups of units keeps the size of each, but not their number: sums over units must be made up for
(:class:`fxfusion.plan.Gains`), unless they are taken by a weight, which then reads the sum of its group.
Queries times keys are summed, and divided by a function of the number of dimensions; both are scaled where
they are written::

    gain ** 2 = (source units / target units) * (source scale / target scale)

A tied weight reads what it also writes, and cannot sum. So what it reads is scaled: the norm or the layer
before it, if nothing else reads that. The same is done where networks scale activations by their width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.capture import Capture, source_line
from fxfusion.errors import ArchitectureMismatchError, WidthMismatchError
from fxfusion.execution import State
from fxfusion.layout import AxisBlock, Block
from fxfusion.plan import Gains, PairedPlan, Plan, Role
from fxfusion.rules.registry import operator_name

SCALINGS = frozenset(["mul", "div", "scaled_dot_product_attention"])
_VIEWS = frozenset(
    [
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "mT"),
        *("slice", "select", "squeeze", "unsqueeze", "expand"),
        *("alias", "clone", "contiguous", "to", "_to_copy", "dropout", "detach"),
    ]
)
_ABSORBING = frozenset(
    [
        *("linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "conv3d", "convolution"),
        *("layer_norm", "rms_norm", "group_norm", "mul", "embedding"),
    ]
)
_NORMS = frozenset(["linalg_vector_norm", "norm"])
_SUMS = _NORMS | {"sum", "nansum", "prod", "logsumexp", "softmax", "_softmax", "log_softmax", "_log_softmax"}
_WINDOWS = ("conv", "pool", "fold", "pad", "upsample", "interpolate", "pixel")  # whose integers are no widths


@dataclasses.dataclass(frozen=True, eq=False)
class Parent:
    """A parent as it is run and aligned.

    Attributes
    ----------
    capture : Capture
        Its graph; parents of equal widths share one.
    plan : Plan
        Where spaces lie in it and in the target's: a :class:`PairedPlan` if its widths differ.
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    """

    capture: Capture
    plan: Plan
    state: State


def pair(
    target: Capture, target_plan: Plan, source: Capture, source_plan: Plan, names: tuple[str, str]
) -> PairedPlan:
    """Pair the spaces of two networks.

    Parameters
    ----------
    target, source : Capture
    target_plan, source_plan : Plan
    names : tuple of str
        Of target and source, for messages.

    Returns
    -------
    PairedPlan

    Raises
    ------
    ArchitectureMismatchError
        If the graphs do not correspond.
    WidthMismatchError
        If something differs in size that no transport may act on.
    """
    pairing = _Pairing(target, target_plan, source, source_plan, names)
    pairing.check_graphs()
    pairing.check_spaces()
    pairing.check_layouts()
    pairing.check_sums()
    return PairedPlan.of(target_plan, source_plan, pairing.gains())


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairing:
    target: Capture
    target_plan: Plan
    source: Capture
    source_plan: Plan
    names: tuple[str, str]
    scales: dict[fx.Node, float] = dataclasses.field(default_factory=dict)  # by node, source over target

    # -- graphs -----------------------------------------------------------------------------------

    def check_graphs(self) -> None:
        """Compare the graphs node by node, and find what they scale differently."""
        left, right = (list(item.module.graph.nodes) for item in (self.target, self.source))
        for first, second in zip(left, right, strict=False):
            if (first.op, first.name, first.target) != (second.op, second.name, second.target):
                self._refuse(first, f"{_describe(first)} in one, {_describe(second)} in the other")
            if [item.name for item in first.all_input_nodes] != [
                item.name for item in second.all_input_nodes
            ]:
                self._refuse(first, f"{_describe(first)} reads other values in one than in the other")
            if first.op == "call_function":
                self._compare(first, second)
        if len(left) != len(right):
            self._refuse(left[-1], f"{len(left)} operators in one, {len(right)} in the other")

    def _compare(self, first: fx.Node, second: fx.Node) -> None:
        operator = operator_name(first.target)
        pairs = list(zip(_numbers(first), _numbers(second), strict=False))
        if len(_numbers(first)) != len(_numbers(second)):
            self._refuse(first, f"{_describe(first)} has other arguments in one than in the other")
        ratio = 1.0
        for (place, own), (_, other) in pairs:
            if own == other or (isinstance(own, float) and math.isclose(own, other, rel_tol=1e-6)):
                continue
            if isinstance(own, float) and operator in SCALINGS and own and other:
                ratio *= own / other if operator == "div" else other / own
            elif isinstance(own, (float, bool, str)) or self._counts(operator, place):
                self._refuse(first, f"{_describe(first)} has {own} in one and {other} in the other")
        if operator == "scaled_dot_product_attention" and first.kwargs.get("scale") is None:
            ratio *= math.sqrt(_size(first.args[0]) / _size(second.args[0]))
        if not math.isclose(ratio, 1.0):
            self.scales[first] = ratio

    @staticmethod
    def _counts(operator: str, place: str) -> bool:
        """Whether an integer argument is more than a width: a stride, a window."""
        return any(part in operator for part in _WINDOWS) and "groups" not in place

    # -- sums -------------------------------------------------------------------------------------

    def check_sums(self) -> None:
        """Make sure that nothing but weights and products sums over units of which there are more or less."""
        unequal = {
            space.name
            for space in self.target_plan.spaces
            if space.size != self.source_plan.scope_size(space.name)
        }
        for node in self.target.module.graph.nodes:
            operator = operator_name(node.target) if node.op == "call_function" else ""
            if operator not in _SUMS or not isinstance(node.args[0], fx.Node):
                continue
            summed = unequal & set(self._along(node.args[0], _dimensions(node)))
            if operator in _NORMS:  # of queries and keys: their products do not depend on it
                summed -= self.target_plan.products
            if summed:
                self._refuse(node, f"{_describe(node)} sums over units of which one has more than the other")

    def _along(self, node: fx.Node, dimensions: list[int] | None) -> Iterator[str]:
        """Yield the spaces that some axes of a value hold; all axes by default."""
        for block in self.target_plan.activations.get(node.name, ()):
            rank = len(block.axes)
            chosen = None if dimensions is None else {dimension % rank for dimension in dimensions}
            for index, axis in enumerate(block.axes):
                if axis is not None and (chosen is None or index in chosen):
                    yield from (factor.space for factor in axis.factors if factor.space)

    def gains(self) -> Gains:
        """Return what weights are multiplied by."""
        products: dict[str, float] = {}
        for space in sorted(self.target_plan.products):
            products[space] = self.source_plan.scope_size(space) / self.target_plan.scope_size(space)
        pending: dict[fx.Node, float] = {}
        for node, ratio in self.scales.items():
            space = next(self._multiplied(node), "")
            if space:
                products[space] *= ratio
            else:
                pending[node] = ratio
        parameters: dict[str, float] = {}
        for node, space in self._tied_readers():
            units = self.source_plan.scope_size(space) / self.target_plan.scope_size(space)
            self._absorb(node, units, pending, parameters)
        while pending:
            node, ratio = pending.popitem()
            self._absorb(node, ratio, pending, parameters)
        spaces = {name: math.sqrt(ratio) for name, ratio in products.items() if not math.isclose(ratio, 1.0)}
        return Gains(spaces, {name: gain for name, gain in parameters.items() if not math.isclose(gain, 1.0)})

    def _tied_readers(self) -> Iterator[tuple[fx.Node, str]]:
        """Yield the values that parameters read which also write, and the space that they sum over."""
        tied = {
            (incidence.parameter, space.name)
            for space in self.target_plan.spaces
            for incidence in space.incidences
            if incidence.role is Role.BOTH and space.size != self.source_plan.scope_size(space.name)
        }
        for node in self.target.module.graph.nodes:
            parameters = self._parameters(node)
            for item in node.all_input_nodes:
                held = set(self._spaces(item))
                for name in parameters:
                    for space in held:
                        if (name, space) in tied and space not in self._spaces(node):
                            yield item, space

    def _absorb(
        self, node: fx.Node, ratio: float, pending: dict[fx.Node, float], parameters: dict[str, float]
    ) -> None:
        """Multiply a value by a ratio, in the parameters that it was last written with."""
        start = node
        while True:
            ratio *= pending.pop(node, 1.0)
            written = self._parameters(node)
            operator = operator_name(node.target) if node.op == "call_function" else ""
            if written:
                used = [len(self._readers(name)) for name in written]
                if operator not in _ABSORBING or max(used) > 1 or len(node.users) > 1:
                    break
                for name in written:
                    parameters[name] = parameters.get(name, 1.0) * ratio
                return
            inputs = [item for item in node.all_input_nodes if _is_tensor(item)]
            scales = operator in ("mul", "div") and len(inputs) == 1
            if len(node.users) > 1 or len(inputs) != 1 or not (operator in _VIEWS or scales):
                break
            node = inputs[0]
        if math.isclose(ratio, 1.0):
            return
        self._refuse(
            start,
            f"what {_describe(start)} computes must be scaled by {ratio:.3g}, since it is summed over or "
            "scaled by another number of units, and no parameter before it serves it alone",
        )

    def _parameters(self, node: fx.Node) -> list[str]:
        """Return the parameters that a node takes, as they are or turned round."""
        found = []
        for item in node.all_input_nodes:
            while (
                item.op == "call_function" and operator_name(item.target) in _VIEWS and item.all_input_nodes
            ):
                item = item.all_input_nodes[0]
            if item.op == "get_attr":
                name = self.target.aliases.get(str(item.target), str(item.target))
                if name in self.target.parameters:
                    found.append(name)
        return found

    def _readers(self, name: str) -> list[fx.Node]:
        """Return the nodes that take a parameter, under any of its names."""
        return [
            user
            for node in self.target.module.graph.nodes
            if node.op == "get_attr" and self.target.aliases.get(str(node.target), str(node.target)) == name
            for user in node.users
        ]

    def _spaces(self, node: fx.Node) -> list[str]:
        """Return the spaces that a node's value holds."""
        return list(self._along(node, None))

    def _multiplied(self, node: fx.Node) -> Iterator[str]:
        """Yield the spaces of units that are multiplied before or after a node scales them."""
        pending, seen = [node], {node}
        while pending:
            item = pending.pop(0)
            yield from (space for space in self._spaces(item) if space in self.target_plan.products)
            if item.op == "call_function" and not any(
                other.op == "get_attr" for other in item.all_input_nodes
            ):
                pending += [other for other in item.all_input_nodes if other not in seen]
                seen.update(item.all_input_nodes)

    def _refuse(self, node: fx.Node, difference: str) -> None:
        source = source_line(node)
        where = f" ({source})" if source else ""
        raise ArchitectureMismatchError(
            f"{self.names[1]} and {self.names[0]} differ in more than width: {difference}{where}. Fuse "
            "models of one architecture."
        )

    # -- spaces -----------------------------------------------------------------------------------

    def check_spaces(self) -> None:
        """Compare which spaces there are, and where."""
        for left, right in (
            (self.target_plan.spaces, self.source_plan.spaces),
            (self.target_plan.fixed, self.source_plan.fixed),
        ):
            found = {space.name: space for space in right}
            for space in left:
                other = found.pop(space.name, None)
                if other is None or (other.scope, other.incidences) != (space.scope, space.incidences):
                    self._unpaired(space.name)
            for name in found:
                self._unpaired(name)
        for space in self.target_plan.fixed:
            if space.size != self.source_plan.scope_size(space.name):
                raise WidthMismatchError(
                    f"{self.names[1]} has {self.source_plan.scope_size(space.name)} units in {space.name}, "
                    f"{self.names[0]} {space.size}: they are told apart, and cannot be paired"
                )

    def _unpaired(self, space: str) -> None:
        raise WidthMismatchError(
            f"the units of {space} have no counterpart: {self.names[1]} and {self.names[0]} have other "
            "spaces. One may have a single unit, head or group where the other has several; see "
            "fxfusion.plan of both."
        )

    def check_layouts(self) -> None:
        """Compare how the spaces lie in every parameter."""
        for name, shape in self.target.parameters.items():
            other = self.source.parameters[name]
            left, right = (plan.layouts.get(name) for plan in (self.target_plan, self.source_plan))
            if left is None or right is None:
                if shape != other:
                    raise WidthMismatchError(
                        f"{name} is {other} in {self.names[1]} and {shape} in {self.names[0]}, and no "
                        "operator reads it"
                    )
                continue
            blocks = list(zip(left.blocks, right.blocks, strict=False))
            if len(left.blocks) != len(right.blocks) or not all(_alike(*pair) for pair in blocks):
                raise WidthMismatchError(
                    f"{name} is {other} in {self.names[1]} and {shape} in {self.names[0]}, and what differs "
                    f"is not free to move: {self._reason(name)}"
                )

    def _reason(self, name: str) -> str:
        """Say which axis of a parameter is fixed, and why."""
        left, right = (plan.explain(name) for plan in (self.target_plan, self.source_plan))
        sizes = self.target.parameters[name], self.source.parameters[name]
        for axis, (own, other) in enumerate(zip(left, right, strict=True)):
            if sizes[0][axis] == sizes[1][axis] and own.structure == other.structure:
                continue
            part = next((part for part in own.parts if not part.free), None)
            why = f", {part.chain[0].message}" if part is not None and part.chain else ""
            return f"axis {axis} enumerates {other.structure} against {own.structure} units{why}"
        return "its units lie differently"


def _numbers(node: fx.Node) -> list[tuple[str, Any]]:
    """Return the arguments of a node that are no nodes, each with its name or place."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    places = [(names[i] if i < len(names) else str(i), value) for i, value in enumerate(node.args)]
    found: list[tuple[str, Any]] = []
    for place, value in (*places, *sorted(node.kwargs.items())):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (bool, int, float, str)):
                found.append((place, item))
    return found


def _dimensions(node: fx.Node) -> list[int] | None:
    """Return the axes over which an operator sums; None for all."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    found = node.kwargs.get("dim")
    if found is None and "dim" in names and names.index("dim") < len(node.args):
        found = node.args[names.index("dim")]
    if isinstance(found, int):
        return [found]
    return [item for item in found if isinstance(item, int)] if isinstance(found, (list, tuple)) else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _size(node: Any) -> int:
    """Return the last size of a node's output."""
    return int(node.meta["val"].shape[-1])


def _describe(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _alike(left: Block, right: Block) -> bool:
    """Return whether two blocks hold the same spaces in the same order, and equally many of all else."""
    return len(left.axes) == len(right.axes) and all(
        _alike_axis(*axes) for axes in zip(left.axes, right.axes, strict=True)
    )


def _alike_axis(left: AxisBlock, right: AxisBlock) -> bool:
    if len(left.factors) != len(right.factors):
        return False
    return all(
        own.space == other.space and (own.space or own.size == other.size)
        for own, other in zip(left.factors, right.factors, strict=True)
    )


def widths_differ(states: Sequence[State]) -> bool:
    """Return whether state dicts of equal names differ in shape."""
    first, *others = states
    return any(other[name].shape != tensor.shape for other in others for name, tensor in first.items())
