"""fxfusion's passes in a pipeline of one's own, and what the result is good for.

    python examples/compile_and_export.py

The passes run in torch's ``PassManager`` beside a pass of the user's; the fused module is an ordinary
GraphModule, so that ``torch.compile`` and ``torch.export`` take it, and its weights load into the class.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxfusion
from fxfusion.passes.align import Align
from fxfusion.passes.apply_transports import ApplyTransports
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import Merge
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.pair import Pair
from fxfusion.passes.propagate import Propagate


@dataclasses.dataclass
class CountOperators(FusionPass):
    """A pass of the user's: says how large the graph is."""

    label: str

    def call(self, graph_module: GraphModule) -> PassResult:
        """Count the operators."""
        count = sum(node.op == "call_function" for node in graph_module.graph.nodes)
        print(f"{self.label}: {count} operators")
        return PassResult(graph_module, False)


def make_model(seed: int) -> nn.Module:
    """Return a small network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4)
    ).eval()


def main() -> None:
    """Fuse by hand, compile, export, and load into the class."""
    first, second = make_model(0), make_model(1)
    example = torch.randn(8, 16)
    graph_module = fxfusion.prepare(second, (example,))
    pipeline = PassManager(
        [
            Normalize(),
            CountOperators("captured"),
            Propagate(),
            Pair([first.state_dict(), second.state_dict()]),
            Align(),
            ApplyTransports(),
            Merge(weights=(0.5, 0.5)),
        ]
    )
    fused = pipeline(graph_module).graph_module
    expected = fused(example)

    compiled = torch.compile(fused, backend="aot_eager")
    print("compiled agrees:", torch.allclose(compiled(example), expected, atol=1e-6))

    exported = torch.export.export(fused, (example,))
    print("exported agrees:", torch.allclose(exported.module()(example), expected, atol=1e-6))

    loaded = make_model(2)
    loaded.load_state_dict(fused.state_dict(), strict=True)
    print("class agrees:", torch.allclose(loaded(example), expected, atol=1e-6))


if __name__ == "__main__":
    main()
