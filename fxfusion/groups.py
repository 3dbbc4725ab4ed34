"""Which group may act on a space: beyond permutations, factors and signs, rotations, invertible maps.

Every operator that meets a space must treat it alike whatever its basis is: sums, contractions and views do;
RMS normalisation does up to its weight, layer normalisation for rotations that leave the mean alone.
Norm weights and biases go elsewhere first (:mod:`fxfusion.folding`): into the weights that read what is
normalised. What is not known to be linear leaves a space with permutations: an operator is never guessed at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any

import torch.utils._pytree as pytree
from torch import fx

from fxfusion.capture import Capture
from fxfusion.flow import space_node
from fxfusion.holding import KEEPING, METADATA, Held, operands_of
from fxfusion.layout import AxisBlock, Block, Factor, ParameterLayout
from fxfusion.plan import Fold, Plan, Role, Rotary, Scaling, Space, Symmetry
from fxfusion.planning import make_plan
from fxfusion.rotary import rotary_parts
from fxfusion.rules.registry import operator_name
from fxfusion.scaling import scalings
from fxfusion.signs import with_signs

_ADDING = frozenset(["add", "sub", "rsub"])
_REDUCING = frozenset(["mean", "sum"])
_BIASES = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "convolution": 2, "addmm": 0, "baddbmm": 0}
_CONTRACTING = frozenset([*_BIASES, "matmul", "mm", "bmm", "mv", "dot", "einsum"])
_NORMS = frozenset(["layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"])

# What occurrences of a space in operands and result make a contraction over it, or a map from or to it.
_LINEAR = frozenset([(0, 0), (1, 1), (2, 0), (3, 1), (2, 2)])


@dataclasses.dataclass(frozen=True)
class Group:
    """The group of one space.

    Attributes
    ----------
    symmetry : Symmetry
    folds : tuple of Fold
        What must be folded before a rotation may act.
    reason : str
        What leaves the space without rotations: an operator and its graph node; or empty.
    scalings : tuple of Scaling
        How its units may be scaled.
    """

    symmetry: Symmetry
    folds: tuple[Fold, ...] = ()
    reason: str = ""
    scalings: tuple[Scaling, ...] = ()


class _NotLinearError(Exception):
    """An operator tells units apart."""


def groups(capture: Capture, plan: Plan) -> dict[str, Group]:
    """Infer the group of every space.

    Parameters
    ----------
    capture : Capture
    plan : Plan

    Returns
    -------
    dict of str to Group
        By name of space.
    """
    held = Held(capture, plan)
    return {space.name: _group(held, space.name) for space in plan.spaces}


def _group(held: Held, space: str) -> Group:
    group = _SpaceGroup(held, space).infer()
    if held.plan[space].symmetry is Symmetry.ROTARY:
        turns = group.symmetry is Symmetry.ORTHOGONAL and not group.folds
        return dataclasses.replace(group, symmetry=Symmetry.ROTARY) if turns else group
    if group.symmetry is Symmetry.PERMUTATION:
        ways = scalings(held, space)
        return dataclasses.replace(group, symmetry=Symmetry.SCALED, scalings=ways) if ways else group
    if group.symmetry is Symmetry.ORTHOGONAL and not group.folds:
        ways = scalings(held, space)
        if len(ways) == 1 and _is_everywhere(ways[0], held.plan[space]):
            return dataclasses.replace(group, symmetry=Symmetry.LINEAR, scalings=ways)
    return group


def _is_everywhere(scaling: Scaling, space: Space) -> bool:
    """Return whether a map, or its inverse, acts at every place of a space."""
    places = {(place.parameter, place.axis) for place in space.incidences}
    alone = len({name for name, _ in places}) == len(places)  # no parameter maps the space to itself
    acting = {place[:2] for place in scaling.exponents}
    return alone and places == acting and {abs(value) for value in scaling.exponents.values()} == {1.0}


def enlarge(capture: Capture, plan: Plan, accepts: Callable[[Fold], bool] = lambda fold: True) -> Plan:
    """Return a plan with the largest known group in every space, and what must be folded for it.

    Parameters
    ----------
    capture : Capture
    plan : Plan
    accepts : callable
        Says of a norm whether it can be folded; by default all can.

    Returns
    -------
    Plan
        Spaces below which others lie keep permutations. Where units may change sign, their signs are spaces
        of their own, below them; dimensions that positions turn by pairs are spaces, too. Norm weights that
        are folded hold no space any more.
    """
    plan, found = _with_pairs(capture, plan)
    outer = {name for space in plan.spaces for name in space.scope}
    for name in outer & found.keys():
        found[name] = Group(Symmetry.PERMUTATION, reason="other spaces lie below its units")
    for name, group in found.items():
        if not all(map(accepts, group.folds)):
            found[name] = Group(Symmetry.PERMUTATION, reason="a norm's bias cannot be divided by its weight")
    folds = tuple(fold for group in found.values() for fold in group.folds)
    folded = {fold.weight for fold in folds}
    spaces = tuple(
        dataclasses.replace(
            space,
            symmetry=found[space.name].symmetry,
            incidences=tuple(place for place in space.incidences if place.parameter not in folded),
        )
        for space in plan.spaces
    )
    layouts = {name: _emptied(layout) if name in folded else layout for name, layout in plan.layouts.items()}
    ways = tuple(way for group in found.values() for way in group.scalings)
    larger = dataclasses.replace(plan, spaces=spaces, layouts=layouts, folds=folds, scalings=ways)
    larger = with_signs(capture, larger)
    graph = plan.graph.copy()
    for space in larger.spaces:
        if space.symmetry is not Symmetry.SIGN:  # what is drawn of a sign is at its units
            graph.nodes[space_node(space.name)]["symmetry"] = space.symmetry.value
    return dataclasses.replace(larger, graph=graph)


def _with_pairs(capture: Capture, plan: Plan) -> tuple[Plan, dict[str, Group]]:
    """Return a plan in which dimensions that positions turn by pairs are spaces, and all groups.

    What else meets these dimensions must treat them alike in every basis. Where something does not (a norm
    with a weight of its own per dimension), they stay fixed.
    """
    parts: Sequence[Rotary] = rotary_parts(capture) if plan.outputs else ()
    while parts:
        larger = make_plan(capture, plan.outputs, parts)
        found = groups(capture, larger)
        wrong = {
            space.name
            for space in larger.spaces
            if space.symmetry is Symmetry.ROTARY and found[space.name].symmetry is not Symmetry.ROTARY
        }
        if not wrong:
            return larger, found
        parts = [part for part in larger.rotary if not wrong & _turned(larger, part)]
    return plan, groups(capture, plan)


def _turned(plan: Plan, part: Rotary) -> set[str]:
    """Return the spaces whose dimensions a part turns."""
    ends = (block.axes[-1] for block in plan.activations.get(part.source, ()))
    return {factor.space for end in ends if end is not None for factor in end.factors if factor.space}


def _emptied(layout: ParameterLayout) -> ParameterLayout:
    axes = tuple(AxisBlock(0, (Factor("", size, 1),)) for size in layout.shape)
    return dataclasses.replace(layout, blocks=(Block(axes),))


class _SpaceGroup:
    """The search for what stands against rotations of one space."""

    def __init__(self, graph: Held, space: str) -> None:
        self.graph, self.space = graph, space
        self.squares: set[fx.Node] = set()
        self.followed: set[fx.Node] = set()  # units lie in them, but no layout is known
        self.scales: dict[fx.Node, tuple[str, str | None]] = {}  # normalised tensor: norm weight, bias
        self.fixes_mean = False

    def infer(self) -> Group:
        try:
            for node in self.graph.nodes.get(self.space, ()):
                self._judge(node)
            folds = tuple(self._fold(node, *vectors) for node, vectors in self.scales.items())
            self._check_readers(folds)
        except _NotLinearError as error:
            return Group(Symmetry.PERMUTATION, reason=str(error))
        return Group(Symmetry.CENTRED if self.fixes_mean else Symmetry.ORTHOGONAL, folds)

    def _refuse(self, node: fx.Node, why: str) -> _NotLinearError:
        return _NotLinearError(f"{node.target} at {node.name} {why}")

    def _holds(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and bool(self.graph.where(node, self.space))

    def _judge(self, node: fx.Node) -> None:
        operator = operator_name(node.target)
        operands = operands_of(node)
        if operator in METADATA or node.name in self.graph.turning:
            return
        if self._holds(node) and not any(self._holds(item) or item in self.followed for item in operands):
            raise self._refuse(node, "makes them, as copies that are alike")
        if any(item in self.squares for item in operands):
            if operator not in _REDUCING or self._holds(node):
                raise self._refuse(node, "takes squares of single units")
            return
        if node.target is getitem or operator in KEEPING:
            self._keep(node, operator, operands)
        elif operator in _ADDING:
            self._goes_on(node, operands)
            # A number added to every unit moves their mean alone.
            numbers = [item for item in node.args[:2] if not isinstance(item, fx.Node) and item]
            self.fixes_mean |= bool(numbers) or not all(map(self._holds, operands[:2]))
        elif operator in ("mul", "div"):
            self._goes_on(node, operands)
            self._scale(node, operands)
        elif operator in ("pow", "square"):
            if operator == "pow" and node.args[1] != 2:
                raise self._refuse(node, "is not linear")
            self.squares.add(node)
        elif operator in _REDUCING:
            self._reduce(node)
        elif operator == "constant_pad_nd":
            self._goes_on(node, operands)
            self.fixes_mean |= bool(node.args[2] if len(node.args) > 2 else 0)
        elif operator in _CONTRACTING:
            self._contract(node, operator, operands)
        elif operator == "scaled_dot_product_attention":
            self._attend(node)
        elif operator in _NORMS:
            self._normalise(node, operator)
        else:
            raise self._refuse(node, "is not known to be linear")

    def _goes_on(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """Refuse where a result must hold the space, but is not known to: what it meets is unseen then."""
        if any(map(self._holds, operands)) and not self._holds(node):
            raise self._refuse(node, "depends on other units, or data, in a way that is not followed")

    def _follow(self, node: fx.Node) -> None:
        """Refuse where a tensor of which no layout is known meets more than views before one is known again.

        Heads below an axis of queries, keys and values have none until that is taken apart; nor have units
        that data pick, and those never have one again.
        """
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                operator = operator_name(user.target)
                if user in seen or operator in METADATA:
                    continue
                if user.target is not getitem and operator not in KEEPING:
                    raise self._refuse(
                        user, "reads units that are not followed: data, or other units, pick them"
                    )
                seen.add(user)
                if user not in self.graph.axes:
                    pending.append(user)
        self.followed |= seen

    def _reduce(self, node: fx.Node) -> None:
        if self._holds(node):
            return
        x = node.args[0]
        given = node.args[1] if len(node.args) > 1 else None
        if x not in self.graph.axes:
            raise self._refuse(node, "sums units that are not followed")
        count = len(self.graph.axes[x])  # type: ignore[index]
        axes = range(count) if not given else [axis % count for axis in pytree.tree_leaves(given)]
        if not set(self.graph.where(x, self.space)) <= set(axes):  # type: ignore[arg-type]
            self._goes_on(node, [x])  # type: ignore[list-item]
        self.fixes_mean = True

    def _keep(self, node: fx.Node, operator: str, operands: Sequence[fx.Node]) -> None:
        if node not in self.graph.axes:
            self._follow(node)
            return
        if operator not in ("cat", "stack"):
            return
        places = self.graph.where(node, self.space)
        along = (node.args[1] if len(node.args) > 1 else 0) % len(self.graph.axes[node])  # type: ignore[operator]
        if places != [along]:
            self.fixes_mean |= not all(map(self._holds, operands))

    def _scale(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        holders = [item for item in node.args[:2] if self._holds(item)]
        if len(holders) == 1:
            if operator_name(node.target) == "div" and holders[0] is not node.args[0]:
                raise self._refuse(node, "divides by single units")
            return
        if holders[0] is holders[1]:
            self.squares.add(node)
            return
        vectors = [item for item in holders if self._is_vector(item)]
        if len(vectors) != 1 or operator_name(node.target) != "mul":
            raise self._refuse(node, "multiplies unit by unit")
        self.scales[node] = self.graph.parameters[vectors[0]], None  # type: ignore[index]

    def _is_vector(self, node: Any) -> bool:
        """Return whether a tensor is a parameter with one number per unit."""
        axes = self.graph.axes[node]
        return node in self.graph.parameters and len(axes) == 1 and self.graph.is_whole(node, 0, self.space)

    def _contract(self, node: fx.Node, operator: str, operands: Sequence[fx.Node]) -> None:
        given = list(operands)
        if operator in _BIASES and len(node.args) > _BIASES[operator]:
            bias = node.args[_BIASES[operator]]
            if isinstance(bias, fx.Node):
                given.remove(bias)
                self.fixes_mean |= self._holds(node) and not self._holds(bias)
        result = len(self.graph.where(node, self.space))
        taken = sum(len(self.graph.where(item, self.space)) for item in given)
        if (taken, result) not in _LINEAR:
            raise self._refuse(node, "multiplies unit by unit, or with what is not known to be theirs")

    def _attend(self, node: fx.Node) -> None:
        for item in (*node.args[:3], node):
            assert isinstance(item, fx.Node)
            places = self.graph.where(item, self.space)
            if places and places != [len(self.graph.axes[item]) - 1]:
                raise self._refuse(node, "treats each unit by itself")
        if any(map(self._holds, node.args[3:])) or self._holds(node.args[0]) != self._holds(node.args[1]):
            raise self._refuse(node, "multiplies unit by unit")
        self._goes_on(node, [item for item in node.args[2:3] if isinstance(item, fx.Node)])

    def _normalise(self, node: fx.Node, operator: str) -> None:
        x, sizes = node.args[:2]
        assert isinstance(x, fx.Node)
        places, last = self.graph.where(x, self.space), len(self.graph.axes.get(x, ())) - 1
        if places != [last] or len(sizes) != 1 or not self.graph.is_whole(x, last, self.space):  # type: ignore[arg-type]
            raise self._refuse(node, "normalises them apart, or with others")
        self.fixes_mean |= "layer" in operator
        vectors = [
            self.graph.parameters.get(item) if isinstance(item, fx.Node) else None
            for item in (*node.args[2:4], None, None)[:2]
        ]
        weight, bias = vectors[0], vectors[1] if "layer" in operator else None
        if weight is not None:
            self.scales[node] = weight, bias

    # -- folding ----------------------------------------------------------------------------------

    def _fold(self, node: fx.Node, weight: str, bias: str | None) -> Fold:
        """Return where a norm's weight can go: what reads the normalised tensor, all of it parameters."""
        readers: dict[tuple[str, int], None] = {}
        readings: set[fx.Node] = set()
        pending, seen = [node], {node}
        while pending:
            item = pending.pop()
            for user in item.users:
                if user in seen or user.op == "output" or operator_name(user.target) in METADATA:
                    continue
                seen.add(user)
                reader = self._reader(user, item)
                if reader is None:
                    pending.append(user)
                else:
                    readers[reader] = None
                    readings.add(user)
        for name in {name for name, _ in readers}:
            if any(user not in readings for user in self._users(name)):
                raise self._refuse(
                    node, f"has a weight that cannot go into {name}, which is used elsewhere, too"
                )
        return Fold(weight, bias, tuple(readers), self.space)

    def _reader(self, user: fx.Node, item: fx.Node) -> tuple[str, int] | None:
        """Return the parameter that contracts over what is normalised; None where it passes through."""
        operator = operator_name(user.target)
        if operator in KEEPING or user.target is getitem:
            if operator in ("cat", "stack"):
                raise self._refuse(user, "joins what is normalised with something else")
            return None
        if operator in _REDUCING and self._holds(user):
            return None
        if operator in ("mul", "div") and sum(map(self._holds, user.args[:2])) == 1:
            return None
        if operator in _CONTRACTING and not self._holds(user):
            others = [other for other in user.all_input_nodes if other is not item and self._holds(other)]
            name = self.graph.parameter(others[0]) if len(others) == 1 else None
            if name is not None:
                incidences = self.graph.plan[self.space].incidences
                places = {(place.axis, place.role) for place in incidences if place.parameter == name}
                axes = {axis for axis, _ in places}
                if places == {(axis, Role.READS) for axis in axes} and len(axes) == 1:
                    return name, axes.pop()
        raise self._refuse(user, "reads what is normalised, and has no weight into which the norm's could go")

    def _users(self, name: str) -> Iterator[fx.Node]:
        """Yield the operators that a parameter meets, seen through its views."""
        pending = [node for node, parameter in self.graph.parameters.items() if parameter == name]
        while pending:
            for user in pending.pop().users:
                if operator_name(user.target) in METADATA:
                    continue
                if operator_name(user.target) in KEEPING and len(user.all_input_nodes) == 1:
                    pending.append(user)
                else:
                    yield user

    def _check_readers(self, folds: Sequence[Fold]) -> None:
        owner: dict[str, str] = {}
        for fold in folds:
            for name, _ in fold.readers:
                if owner.setdefault(name, fold.weight) != fold.weight:
                    raise _NotLinearError(f"{name} reads what two norms give")
            if sum(other.weight == fold.weight for other in folds) > 1:
                raise _NotLinearError(f"{fold.weight} is the weight of two norms")
