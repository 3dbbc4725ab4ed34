"""Normalize: drop what carries no computation, so that later passes and emitted graphs stay clean."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.passes.base import FusionPass

CHECKS = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")


def normalize(graph_module: GraphModule) -> bool:
    """Remove guards, assertions and dead code.

    A guard pins the example's sizes and an assertion the example's dtype; a fused module must run at any
    batch size, and certification runs the graph in float64.

    Returns
    -------
    bool
        Whether anything was removed.
    """
    before = len(graph_module.graph.nodes)
    for node in list(graph_module.graph.nodes):
        is_guard = node.op == "call_module" and node.name.startswith("_guards")
        if (is_guard or str(node.target).startswith(CHECKS)) and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    modified = len(graph_module.graph.nodes) != before
    if modified:
        graph_module.recompile()
    return modified


@dataclasses.dataclass(eq=False)
class Normalize(FusionPass):
    """Drop guards, metadata assertions and dead code."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass."""
        return PassResult(graph_module, normalize(graph_module))

    def ensures(self, graph_module: GraphModule) -> None:
        """The graph is well formed and holds no assertion on metadata."""
        graph_module.graph.lint()
        assert not any(
            node.target is torch.ops.aten._assert_tensor_metadata.default for node in graph_module.graph.nodes
        )
