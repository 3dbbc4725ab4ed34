"""Which axes of every tensor of a graph hold which space, and the operators that move units about."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.capture import Capture, hint
from fxfusion.layout import AxisBlock
from fxfusion.plan import Plan
from fxfusion.rules.registry import operator_name

_MOVING = (
    "view reshape _unsafe_view transpose permute t expand clone contiguous to _to_copy alias unsqueeze "
    "squeeze detach dropout flatten unflatten split split_with_sizes chunk narrow slice select unbind "
    "index_select roll flip embedding neg positive movedim index repeat lift_fresh_copy type_as expand_as "
    "view_as avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d cat stack"
)
_UNREAD = (
    "sym_size _assert_tensor_metadata zeros_like ones_like full_like new_zeros new_ones new_full empty_like "
    "new_empty _assert_async _assert_scalar"
)
KEEPING = frozenset(_MOVING.split())
"""They keep every unit's values, or combine units with the same numbers wherever they lie."""
METADATA = frozenset(_UNREAD.split())
"""They read no values."""


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an operator is given, each as often as it is."""
    return [item for item in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(item, fx.Node)]


def sizes_of(item: Any) -> list[Any]:
    """Return a tensor's sizes on the example; none of what is no tensor."""
    value = item.meta.get("val") if isinstance(item, fx.Node) else None
    return list(map(hint, value.shape)) if isinstance(value, torch.Tensor) else []


class Held:
    """Which axes of every tensor of a graph hold which space."""

    def __init__(self, capture: Capture, plan: Plan) -> None:
        self.plan = plan
        self.turning = frozenset[str]().union(*(part.inner for part in plan.rotary))
        self.parameters: dict[fx.Node, str] = {}
        self.axes: dict[fx.Node, list[list[AxisBlock]]] = {}
        self.nodes: dict[str, list[fx.Node]] = {}  # that hold a space or read a node that does
        self.holders: dict[str, list[fx.Node]] = {}  # that hold a space, parameters among them
        for node in capture.module.graph.nodes:
            name = capture.aliases.get(str(node.target), str(node.target))
            if node.op == "get_attr" and name in plan.layouts:
                self.parameters[node] = name
                blocks = [list(block.axes) for block in plan.layouts[name].blocks]
                self.axes[node] = [list(axis) for axis in zip(*blocks, strict=True)]
            elif node.name in plan.activations:
                found = [block.axes for block in plan.activations[node.name]]
                self.axes[node] = [
                    [part for part in axis if part is not None] for axis in zip(*found, strict=True)
                ]
            for space in self.spaces(node):
                self.holders.setdefault(space, []).append(node)
            if node.op == "call_function":
                met = {space for item in (node, *node.all_input_nodes) for space in self.spaces(item)}
                for space in met:
                    self.nodes.setdefault(space, []).append(node)

    def spaces(self, node: fx.Node) -> set[str]:
        """Return the spaces that a tensor holds."""
        parts = (part for axis in self.axes.get(node, ()) for part in axis)
        return {factor.space for part in parts for factor in part.factors if factor.space}

    def where(self, node: fx.Node, space: str) -> list[int]:
        """Return the axes of a tensor that hold a space."""
        return [
            index
            for index, parts in enumerate(self.axes.get(node, ()))
            if any(factor.space == space for part in parts for factor in part.factors)
        ]

    def is_whole(self, node: fx.Node, axis: int, space: str) -> bool:
        """Return whether an axis enumerates the units of a space, once, and nothing else."""
        parts = self.axes[node][axis]
        return len({part.offset for part in parts}) == 1 and all(
            [factor.space for factor in part.factors] == [space] for part in parts
        )

    def parameter(self, node: fx.Node) -> str | None:
        """Return the parameter of which a tensor is a view."""
        while node not in self.parameters:
            if operator_name(node.target) not in KEEPING or len(node.all_input_nodes) != 1:
                return None
            node = node.all_input_nodes[0]
        return self.parameters[node]
