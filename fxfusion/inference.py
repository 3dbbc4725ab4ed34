"""Inference: run operator rules over a captured graph until the type of every axis is settled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.axes import Axis, Constant, Leaf, Reason, is_free, resolve
from fxfusion.capture import Capture, attribute, hint, is_real, source_line
from fxfusion.decomposition import Decomposer
from fxfusion.errors import NotationError, RuleError
from fxfusion.plan import Rotary
from fxfusion.rules import Context, Typed, find_rule, operator_name
from fxfusion.rules.context import Meaning
from fxfusion.rules.meaning import apply, expose

MAXIMAL_SWEEPS = 10
LARGEST_FOLDED = 1 << 22  # elements of a constant whose values are looked at
DEEPEST_DECOMPOSITION = 5  # operators inside of operators


@dataclasses.dataclass(eq=False)
class Inferred:
    """The settled types of a graph.

    Attributes
    ----------
    parameters : dict of str to tuple of Axis
        Axis types of every parameter and statistics buffer.
    tensors : dict of str to tuple of Axis
        Axis types of every node with one tensor output that is no parameter.
    context : Context
        With the uses of parameters and the mixes of the last sweep.
    ruleless : list of Reason
        One per node whose operator has no rule and that touched a free axis.
    meanings : dict of str to Meaning
        What the values of nodes say about units.
    turned : dict of Leaf to tuple of (int, int)
        Dimensions that are turned in pairs, and the pairs.
    unsound : tuple of Rotary
        Of the given parts, those that do more to the types that their operands have: nothing else holds
        before inference has run without them.
    """

    parameters: dict[str, tuple[Axis, ...]]
    tensors: dict[str, tuple[Axis, ...]]
    context: Context
    ruleless: list[Reason]
    meanings: dict[str, Meaning] = dataclasses.field(default_factory=dict)
    turned: dict[Leaf, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)
    unsound: tuple[Rotary, ...] = ()


def infer(capture: Capture, outputs: frozenset[int], parts: Sequence[Rotary] = ()) -> Inferred:
    """Infer the axis types of a captured graph.

    Parameters
    ----------
    capture : Capture
    outputs : frozenset of int
        Flat positions of the outputs that must be kept: their axes are fixed.
    parts : sequence of Rotary, optional
        Parts of the graph that are taken as one operator, which keeps every axis.

    Returns
    -------
    Inferred
    """
    return _Inference(capture, outputs, parts).run()


class _Inference:
    def __init__(self, capture: Capture, outputs: frozenset[int], parts: Sequence[Rotary]) -> None:
        self.capture = capture
        self.outputs = outputs
        self.parts = parts
        named = {node.name: node for node in capture.module.graph.nodes} if parts else {}
        self.sources = {named[part.result]: named[part.source] for part in parts}
        self.within = {named[name] for part in parts for name in part.inner}
        self.context = Context()
        self.parameters: dict[str, tuple[Axis, ...]] = {}
        self.folded: dict[str, torch.Tensor] = {}
        self.uniform: dict[str, list[bool]] = {}  # of each constant: along which axes it does not vary
        self.ruleless: dict[str, Reason] = {}
        self.env: dict[fx.Node, Any] = {}
        self.place = ""  # of the node being typed: its name, below those of the operators it is inside of
        self.inside: tuple[str, ...] = ()  # operators that are being decomposed
        self.decomposer = Decomposer()
        self.steps: dict[fx.GraphModule, list[_Step]] = {}

    def run(self) -> Inferred:
        for name, shape in self.capture.parameters.items():
            self.context.enter(name, "parameter", "", [])
            self.parameters[name] = tuple(
                Constant(1) if size == 1 else self.context.unifier.leaf(size) for size in shape
            )
        unifier = self.context.unifier
        for _ in range(MAXIMAL_SWEEPS):
            unifier.sweep += 1
            unifier.changes = 0
            self.context.records = type(self.context.records)()
            self._sweep()
            self.context.settle_orders(self.parameters)
            if not unifier.changes:
                break
        else:
            self._give_up()
        tensors = {
            node.name: value.axes
            for node in self.capture.module.graph.nodes
            if isinstance(value := self.env[node], Typed) and not value.parameter
        }
        meanings = {
            node.name: value.meaning
            for node in self.capture.module.graph.nodes
            if isinstance(value := self.env[node], Typed) and value.meaning is not None
        }
        found = Inferred(self.parameters, tensors, self.context, list(self.ruleless.values()), meanings)
        self._turned(found)
        return found

    def _turned(self, found: Inferred) -> None:
        """Enter which dimensions are turned in pairs, and the parts for which that does not hold."""
        unsound = []
        for part in self.parts:
            axes = found.tensors.get(part.source)
            if axes is None:  # a parameter that is turned itself
                unsound.append(part)
                continue
            *leading, last = map(resolve, axes)
            fixed = not any(is_free(leading[axis]) for axis in part.varying)
            if not is_free(last):
                sound = fixed
            elif isinstance(last, Leaf):
                sound = fixed and found.turned.setdefault(last, part.planes) == part.planes
            else:
                sound = False
            if not sound:
                unsound.append(part)
        found.unsound = tuple(unsound)

    def _give_up(self) -> None:
        """Freeze everything: types that have not settled may still lack a constraint."""
        self.context.enter("", "inference", "", [])
        message = f"inference did not settle in {MAXIMAL_SWEEPS} sweeps: every axis is frozen"
        self.ruleless[""] = self.context.reason("no rule", message)
        for axes in self.parameters.values():
            for axis in axes:
                self.context.unifier.fix(axis, "no rule", message)

    def _sweep(self) -> None:
        self.env = {}
        for axes in self.parameters.values():
            self.context.unifier.seal(axes)
        for step in self._steps_of(self.capture.module):
            self.place = step.node.name
            self.context.enter(step.node.name, step.operator, step.source, step.shapes)
            if step.node in self.within:
                source = self.sources.get(step.node)
                self.env[step.node] = None if source is None else Typed(self.env[source].axes)
            else:
                self.env[step.node] = _as_mask(step.node, self._visit(step))

    def _steps_of(self, module: fx.GraphModule) -> list[_Step]:
        if module not in self.steps:
            self.steps[module] = [_step(node) for node in module.graph.nodes]
        return self.steps[module]

    def _visit(self, step: _Step) -> Any:
        node = step.node
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return self._output(node)
        return self._call(step)

    def _call(self, step: _Step) -> Any:
        node = step.node
        if not step.shapes:
            return hint(node.meta.get("val"))
        if node.target is getitem:
            source = self.env[node.args[0]]  # type: ignore[index]
            return source[node.args[1]]
        return self._operator(node, step)

    def _input(self, node: fx.Node) -> Any:
        if not self.context.shapes:
            return node.meta.get("val")
        reason = self.context.reason("input", "it is an axis of an input")
        return Typed(
            tuple(
                Constant(1) if size == 1 else self.context.unifier.leaf(size, reason)
                for size in self.context.shapes[0]
            )
        )

    def _attribute(self, node: fx.Node) -> Any:
        name = self.capture.aliases.get(str(node.target), str(node.target))
        if name in self.parameters:
            return Typed(self.parameters[name], name, frozenset([name]))
        value = attribute(self.capture.module, str(node.target))
        return self._constant(node, value) if isinstance(value, torch.Tensor) else value

    def _constant(self, node: fx.Node, value: torch.Tensor) -> Typed:
        """Type a constant by where its values vary."""
        known = is_real(value) and value.numel() <= LARGEST_FOLDED
        if self.place not in self.uniform:
            self.uniform[self.place] = [
                size <= 1 or (known and bool((value == value.narrow(axis, 0, 1)).all()))
                for axis, size in enumerate(value.shape)
            ]
        reason = self.context.reason("constant", "a constant varies along it")
        axes = tuple(
            Constant(int(size)) if uniform else self.context.unifier.leaf(int(size), reason)
            for size, uniform in zip(value.shape, self.uniform[self.place], strict=True)
        )
        if known:
            self.folded[self.place] = value
        return Typed(axes, value=value if known else None)

    def _output(self, node: fx.Node) -> None:
        flat = node.args[0]
        assert isinstance(flat, Sequence)
        for index, item in enumerate(flat):
            if index in self.outputs and isinstance(item, fx.Node) and isinstance(self.env[item], Typed):
                for axis in self.env[item].axes:
                    self.context.unifier.fix(axis, "output", f"it is an axis of output {index}")
                expose(self.context, self.env[item])

    # -- operators ------------------------------------------------------------------------------

    def _operator(self, node: fx.Node, step: _Step) -> Any:
        tensors = [self.env[item] for item in node.all_input_nodes if isinstance(self.env[item], Typed)]
        if all(tensor.value is not None for tensor in tensors):
            folded = self._fold(node)
            if folded is not None:
                return self._constant(node, folded)
        operator = find_rule(node.target)
        why = "it has no rule"
        if step.data_dependent:
            return self._without_rule(node, tensors, "how much it takes or gives depends on the data")
        if operator is not None:
            args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), lambda item: self.env[item])
            try:
                self.context.dtypes = step.dtypes
                typed = apply(self.context, operator_name(node.target), operator, args, kwargs)
                return self._checked(typed, self._origins(tensors))
            except (NotationError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                why = f"its rule does not cover this call ({error})"
        result = self._decomposed(step, tensors)
        return self._without_rule(node, tensors, why) if result is None else result

    def _decomposed(self, step: _Step, tensors: Sequence[Typed]) -> Any | None:
        """Type an operator by the operators that it is made of, or return None if that cannot be done.

        Nothing is fixed here that freezing the operands would not fix, too.
        """
        node, place = step.node, self.place
        if len(self.inside) == DEEPEST_DECOMPOSITION:
            return None
        args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), lambda item: item.meta.get("val"))
        args, kwargs = pytree.tree_map(hint, (args, kwargs))
        graph = self.decomposer(node.target, args, kwargs, _read_outputs(node))
        if graph is None:
            return None
        flat = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
        operands = [self.env[item] for item in flat if _is_tensor(item)]
        name, source, inside = self.context.node, self.context.source, self.inside
        self.inside = (*inside, step.operator)
        try:
            results = self._type_inside(graph, operands, place)
        except RuleError:  # of a rule inside, whose operands are not at hand here
            results = None
        self.place, self.inside = place, inside
        self.context.enter(name, step.operator, source, step.shapes, place)
        return None if results is None else self._collected(node, results, self._origins(tensors))

    def _type_inside(self, graph: fx.GraphModule, operands: Sequence[Typed], place: str) -> list[Any]:
        """Type a decomposition; return its outputs. A parameter among the operands stays a parameter."""
        name, source = self.context.node, self.context.source
        given = iter(operands)
        for step in self._steps_of(graph):
            node = step.node
            self.place = f"{place}/{node.name}"
            self.context.enter(name, step.operator, source, step.shapes, self.place)
            if node.op == "output":
                results = fx.map_arg(node.args[0], lambda item: self.env[item])
                return list(results) if isinstance(results, (list, tuple)) else [results]
            if node.op == "placeholder":
                self.env[node] = next(given)
                continue
            if node.op == "get_attr":
                constant = attribute(graph, str(node.target))
                value = self._constant(node, constant) if step.shapes else constant
            else:
                value = self._call(step)
            self.env[node] = value = _as_mask(node, value)
            if isinstance(value, Typed):
                self.context.records.inner.append(value.axes)
        return []

    def _collected(self, node: fx.Node, results: list[Any], origins: frozenset[str]) -> Any | None:
        """Return the outputs of a decomposed operator; what nobody reads was not computed."""
        shapes = self.context.shapes
        typed = [
            item if isinstance(item, Typed) else Typed(tuple(self.context.fixed_like(shape)))
            for item, shape in zip(results, shapes, strict=False)
        ]
        if [item.shape for item in typed] != shapes:
            return None
        several = isinstance(node.meta.get("val"), (list, tuple))
        return self._checked(typed if several else typed[0], origins)

    def _origins(self, tensors: Sequence[Typed]) -> frozenset[str]:
        """Return the parameters from which alone the node is computed, or nothing."""
        if any(not tensor.origins and tensor.value is None for tensor in tensors):
            return frozenset()
        return frozenset[str]().union(*(tensor.origins for tensor in tensors))

    def _checked(self, result: Typed | Sequence[Typed], origins: frozenset[str]) -> Any:
        results = [result] if isinstance(result, Typed) else list(result)
        for typed, shape in zip(results, self.context.shapes, strict=False):
            if typed.shape != shape:
                raise RuleError(
                    f"the rule of {self.context.operator} gave {typed.shape} for an output of {shape} at "
                    f"node {self.context.node} ({self.context.source or 'no source line'}): correct the rule"
                )
            encoded = typed.axes
            if typed.meaning is not None and typed.meaning.kind == "index":
                encoded = (*typed.axes, typed.meaning.axis)
                self.context.records.inner.append(encoded)
            self.context.unifier.seal(encoded)
        checked = [
            Typed(typed.axes, origins=typed.origins or origins, meaning=typed.meaning) for typed in results
        ]
        return checked[0] if isinstance(result, Typed) else checked

    def _without_rule(self, node: fx.Node, tensors: Sequence[Typed], why: str) -> Any:
        """Freeze what an operator without a rule touches; it matters only if something there is free."""
        expose(self.context, *tensors)
        free = [axis for tensor in tensors for axis in tensor.axes if is_free(axis)]
        if free:
            inside = f" (inside {self.inside[0]})" if self.inside else ""
            message = f"{self.context.operator}{inside} freezes its operands: {why}"
            self.ruleless[self.place] = self.context.reason("no rule", message)
            for axis in free:
                self.context.unifier.fix(axis, "no rule", message)
        fixed = [Typed(tuple(self.context.fixed_like(shape))) for shape in self.context.shapes]
        return fixed if isinstance(node.meta.get("val"), (list, tuple)) else fixed[0]

    def _fold(self, node: fx.Node) -> torch.Tensor | None:
        """Evaluate a node that depends on neither parameters nor inputs."""
        if self.place in self.folded:
            return self.folded[self.place]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return None
        if sum(math.prod(shape) for shape in self.context.shapes) > LARGEST_FOLDED or "rand" in str(
            node.target
        ):
            return None

        def number(item: fx.Node) -> Any:
            known = self.env[item]
            return known.value if isinstance(known, Typed) else known

        args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), number)
        try:
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # it cannot be evaluated alone: its rule types it
            return None
        return result if isinstance(result, torch.Tensor) and is_real(result) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """What of a graph node stays the same at every sweep; symbolic sizes at their hints."""

    node: fx.Node
    operator: str
    source: str
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    data_dependent: bool


def _step(node: fx.Node) -> _Step:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    tensors = [item for item in values if isinstance(item, torch.Tensor)]
    shapes = [tuple(1 if _is_unknown(size) else int(hint(size)) for size in item.shape) for item in tensors]
    met = [*tensors, *(item.meta.get("val") for item in node.all_input_nodes)]
    unknown = any(
        _is_unknown(size)
        for item in met
        for size in (item.shape if isinstance(item, torch.Tensor) else [item])
    )
    return _Step(node, str(node.target), source_line(node), shapes, [item.dtype for item in tensors], unknown)


def _is_unknown(size: Any) -> bool:
    """Return whether a size is known only when the data is."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor)


def _as_mask(node: fx.Node, value: Any) -> Any:
    kind = node.meta.get("val")
    if isinstance(value, Typed) and isinstance(kind, torch.Tensor) and not kind.is_floating_point():
        boolean = kind.dtype is torch.bool
        return dataclasses.replace(value, boolean=boolean, whole=not boolean and not kind.is_complex())
    return value


def _read_outputs(node: fx.Node) -> frozenset[int] | None:
    """Return which of a node's several outputs somebody reads; None if that is not to be seen."""
    if not isinstance(node.meta.get("val"), (list, tuple)) or any(
        user.target is not getitem for user in node.users
    ):
        return None
    return frozenset(user.args[1] for user in node.users)  # type: ignore[misc]
