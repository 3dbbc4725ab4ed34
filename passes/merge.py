"""Merge: average the aligned parents into the graph's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxfusion.average import weighted_average
from fxfusion.passes.base import FusionPass
from fxfusion.state import state_of


def write(graph_module: GraphModule, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
    """Put new tensors in a graph module under all their names: replaced, never written in place.

    The captured module shares its tensors with the user's model.
    """
    replaced = {name: _like(_get(graph_module, name), tensor) for name, tensor in tensors.items()}
    for alias, name in aliases.items():
        if name in replaced:
            replaced[alias] = replaced[name]
    for name, tensor in replaced.items():
        path, _, attribute = name.rpartition(".")
        owner = graph_module.get_submodule(path)
        if attribute in owner._parameters or attribute in owner._buffers:
            setattr(owner, attribute, tensor)


def _get(graph_module: GraphModule, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(path), attribute)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    return new


@dataclasses.dataclass(eq=False)
class Merge(FusionPass):
    """Average the aligned parents.

    Parameters
    ----------
    weights : sequence of float, optional
        The parents' shares, summing to one; equal by default.
    """

    weights: Sequence[float] | None = None

    def requires(self, graph_module: GraphModule) -> None:
        """The parents are aligned."""
        state_of(graph_module, "aligned", "ApplyTransports")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass; the graph module's parameters are replaced."""
        state = state_of(graph_module)
        count = len(state.aligned)
        state.weights = tuple(self.weights) if self.weights is not None else (1.0 / count,) * count
        state.merged = weighted_average(state.aligned, state.weights, state.target)
        write(graph_module, state.merged, state.capture.aliases)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every merged number is finite, but where the target's is not."""
        state = state_of(graph_module, "merged", "Merge")
        own = state.aligned[state.target]
        assert all(
            bool((tensor.isfinite() | own[name].isinf()).all())
            for name, tensor in state.merged.items()
            if tensor.is_floating_point()
        )
