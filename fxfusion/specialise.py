"""Specialise: another way into a model whose control flow depends on data.

``torch.export`` refuses to decide a branch by a tensor's value. Here the model is traced while it runs on
the example inputs, each branch as they take it. What comes out computes the same for inputs that take the
same branches, and only for those: say what your inputs have in common, and check on others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fxfusion.errors import CaptureError


class Specialised(torch.nn.Module):
    """A traced graph as a module with the model's own parameters and buffers, names and outputs."""

    _graph: fx.GraphModule

    def __init__(self, model: torch.nn.Module, graph: fx.GraphModule, inputs: Any, outputs: Any) -> None:
        super().__init__()
        self._inputs, self._outputs = inputs, outputs
        self._graph = graph
        owners: dict[str, torch.nn.Module] = {"": self}
        saved = model.state_dict().keys()
        for name, tensor in _tensors(model).items():
            path, _, attribute = name.rpartition(".")
            owner = _owner(self, path, owners)
            if isinstance(tensor, torch.nn.Parameter):
                owner.register_parameter(attribute, tensor)
            else:
                owner.register_buffer(attribute, tensor, persistent=name in saved)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the traced branches.

        Raises
        ------
        TypeError
            If the inputs have another structure than the traced ones.
        """
        state = _tensors(self)
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._inputs:
            raise TypeError(f"traced with other inputs: {self._inputs}")
        outputs = self._graph(state, flat)
        return pytree.tree_unflatten(outputs, self._outputs)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, tied ones under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _owner(root: torch.nn.Module, path: str, owners: dict[str, torch.nn.Module]) -> torch.nn.Module:
    if path not in owners:
        parent, _, name = path.rpartition(".")
        owners[path] = torch.nn.Module()
        _owner(root, parent, owners).add_module(name, owners[path])
    return owners[path]


def specialise(
    model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Specialised:
    """Trace a model on example inputs, with every branch as they take it.

    Parameters
    ----------
    model : torch.nn.Module
        It must have weights, and is not touched: the result shares them.
    args, kwargs : sequence, mapping
        Example inputs. Their sizes are fixed.

    Returns
    -------
    Specialised
        Takes and returns what the model does, under the same parameter names, and can be exported.

    Raises
    ------
    CaptureError
        If the model cannot be traced either.

    Examples
    --------
    >>> import torch, fxfusion
    >>> class Branching(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    ...
    ...     def forward(self, x):
    ...         return self.second(self.first(x).relu() if x.max() > -9 else self.first(x))
    >>> x = torch.randn(2, 4)
    >>> len(fxfusion.plan(specialise(Branching(), (x,)), (x,)).spaces)
    1
    """
    name = type(model).__name__
    training = [module for module in model.modules() if module.training]
    flat, inputs = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    state = _tensors(model)
    found: list[Any] = []

    def call(state: dict[str, torch.Tensor], flat: list[Any]) -> list[Any]:
        own_args, own_kwargs = pytree.tree_unflatten(flat, inputs)
        leaves, spec = pytree.tree_flatten(functional_call(model, state, own_args, own_kwargs))
        found[:] = [spec]
        return leaves

    try:
        for module in training:
            module.training = False
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make_fx(call, pre_dispatch=True, _error_on_data_dependent_ops=False)(state, flat)
    except Exception as error:  # tracing raises whatever the model raises
        reason = f"{type(error).__name__}: {error}"
        raise CaptureError(f"{name} cannot be traced on these inputs either: {reason}") from error
    finally:
        for module in training:
            module.training = True
    _prune(graph)
    return Specialised(model, graph, inputs, found[0]).eval()


def _prune(graph: fx.GraphModule) -> None:
    """Drop what nobody reads: the questions that decided branches, which export would ask again."""
    for node in reversed(graph.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        writes = schema is not None and schema.is_mutable
        if node.op == "call_function" and not node.users and not writes:
            graph.graph.erase_node(node)
    graph.recompile()
