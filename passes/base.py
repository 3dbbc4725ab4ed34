"""The base of all passes: torch's ``PassBase``, with the postcondition checked on the result."""

from __future__ import annotations

import abc

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult


class FusionPass(PassBase):
    """A pass whose options are its dataclass fields.

    ``PassBase.__call__`` hands its *input* to ``ensures``; here ``ensures`` sees the result, so that a
    postcondition means what it says.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check, run, and check the result."""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass."""
