"""Inference: run operator rules over a captured graph until the type of every axis is settled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from fxfusion.axes import Axis, Constant, Reason, is_free
from fxfusion.capture import Capture
from fxfusion.errors import NotationError, RuleError
from fxfusion.rules import Context, Typed, find_rule

MAXIMAL_SWEEPS = 10
LARGEST_FOLDED = 1 << 22  # elements of a constant whose values are looked at
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


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
    """

    parameters: dict[str, tuple[Axis, ...]]
    tensors: dict[str, tuple[Axis, ...]]
    context: Context
    ruleless: list[Reason]


def infer(capture: Capture, outputs: frozenset[int]) -> Inferred:
    """Infer the axis types of a captured graph.

    Parameters
    ----------
    capture : Capture
    outputs : frozenset of int
        Flat positions of the outputs that must be kept: their axes are fixed.

    Returns
    -------
    Inferred
    """
    return _Inference(capture, outputs).run()


class _Inference:
    def __init__(self, capture: Capture, outputs: frozenset[int]) -> None:
        self.capture = capture
        self.outputs = outputs
        self.context = Context()
        self.parameters: dict[str, tuple[Axis, ...]] = {}
        self.folded: dict[str, torch.Tensor] = {}
        self.uniform: dict[str, list[bool]] = {}  # of each constant: along which axes it does not vary
        self.ruleless: dict[str, Reason] = {}
        self.env: dict[fx.Node, Any] = {}
        self.masks = {
            node
            for node in capture.module.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dtype is torch.bool
        }
        self.steps = [(node, *_facts(node)) for node in capture.module.graph.nodes]

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
            if not unifier.changes:
                break
        else:
            self._give_up()
        tensors = {
            node.name: value.axes
            for node, value in self.env.items()
            if isinstance(value, Typed) and not value.parameter
        }
        return Inferred(self.parameters, tensors, self.context, list(self.ruleless.values()))

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
        for node, operator, source, shapes in self.steps:
            self.context.enter(node.name, operator, source, shapes)
            value = self._visit(node)
            if isinstance(value, Typed) and node in self.masks:
                value = dataclasses.replace(value, boolean=True)
            self.env[node] = value

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return self._output(node)
        if not self.context.shapes:
            return _hint(node.meta.get("val"))
        if node.target is getitem:
            source = self.env[node.args[0]]  # type: ignore[index]
            return source[node.args[1]]
        return self._operator(node)

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
        value = _get(self.capture.module, str(node.target))
        return self._constant(node, value) if isinstance(value, torch.Tensor) else value

    def _constant(self, node: fx.Node, value: torch.Tensor) -> Typed:
        """Type a constant by where its values vary."""
        known = _is_real(value) and value.numel() <= LARGEST_FOLDED
        if node.name not in self.uniform:
            self.uniform[node.name] = [
                size == 1 or (known and bool((value == value.narrow(axis, 0, 1)).all()))
                for axis, size in enumerate(value.shape)
            ]
        reason = self.context.reason("constant", "a constant varies along it")
        axes = tuple(
            Constant(int(size)) if uniform else self.context.unifier.leaf(int(size), reason)
            for size, uniform in zip(value.shape, self.uniform[node.name], strict=True)
        )
        if known:
            self.folded[node.name] = value
        return Typed(axes, value=value if known else None)

    def _output(self, node: fx.Node) -> None:
        flat = node.args[0]
        assert isinstance(flat, Sequence)
        for index, item in enumerate(flat):
            if index in self.outputs and isinstance(item, fx.Node) and isinstance(self.env[item], Typed):
                for axis in self.env[item].axes:
                    self.context.unifier.fix(axis, "output", f"it is an axis of output {index}")

    # -- operators ------------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> Any:
        tensors = [self.env[item] for item in node.all_input_nodes if isinstance(self.env[item], Typed)]
        if all(tensor.value is not None for tensor in tensors):
            folded = self._fold(node)
            if folded is not None:
                return self._constant(node, folded)
        operator = find_rule(node.target)
        if operator is None:
            return self._without_rule(node, tensors, "it has no rule")
        args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), lambda item: self.env[item])
        try:
            result = operator(self.context, *args, **kwargs)
        except (NotationError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            return self._without_rule(node, tensors, f"its rule does not cover this call ({error})")
        return self._checked(result, self._origins(tensors))

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
            self.context.unifier.seal(typed.axes)
        checked = [Typed(typed.axes, origins=origins) for typed in results]
        return checked[0] if isinstance(result, Typed) else checked

    def _without_rule(self, node: fx.Node, tensors: Sequence[Typed], why: str) -> Any:
        """Freeze what an operator without a rule touches; it matters only if something there is free."""
        free = [axis for tensor in tensors for axis in tensor.axes if is_free(axis)]
        if free:
            message = f"{self.context.operator} freezes its operands: {why}"
            self.ruleless[node.name] = self.context.reason("no rule", message)
            for axis in free:
                self.context.unifier.fix(axis, "no rule", message)
        fixed = [Typed(tuple(self.context.fixed_like(shape))) for shape in self.context.shapes]
        return fixed if isinstance(node.meta.get("val"), (list, tuple)) else fixed[0]

    def _fold(self, node: fx.Node) -> torch.Tensor | None:
        """Evaluate a node that depends on neither parameters nor inputs."""
        if node.name in self.folded:
            return self.folded[node.name]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return None
        if sum(_volume(shape) for shape in self.context.shapes) > LARGEST_FOLDED or "rand" in str(
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
        return result if isinstance(result, torch.Tensor) and _is_real(result) else None


def _facts(node: fx.Node) -> tuple[str, str, list[tuple[int, ...]]]:
    """Return a node's operator, source line and output shapes, symbolic sizes at their hints."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    shapes = [
        tuple(int(_hint(size)) for size in item.shape) for item in values if isinstance(item, torch.Tensor)
    ]
    return str(node.target), source_line(node), shapes


def source_line(node: fx.Node) -> str:
    """Return ``file:line`` of the model's code that made a node, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return ":".join(own[-1]) if own else ""


def _hint(value: Any) -> Any:
    """Return the size that the example has where the graph is symbolic."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def _is_real(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _get(module: torch.nn.Module, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module
