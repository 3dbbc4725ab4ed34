"""Decomposition of one operator into operators that may have rules, traced on tensors without numbers.

Only inference looks at these graphs: the captured graph keeps the operator itself. A decomposition is not
taken on trust: tracing may lose a write into a view, so small ones are computed and compared, and none may
read memory that was not written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.rules import find_rule, operator_name

LARGEST_DECOMPOSITION = 300  # nodes: a recurrence unrolled over time is better frozen than inferred slowly
LARGEST_COMPARED = 1 << 18  # elements of all arguments and results with which one is computed and compared
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")


class Decomposer:
    """Traces decompositions, each once per operator, shapes and other arguments.

    Examples
    --------
    >>> x = torch.empty(2, 8, 3, device="meta")
    >>> graph = Decomposer()(torch.ops.aten.channel_shuffle.default, (x, 2), {}, None)
    >>> [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    ['view.default', 'transpose.int', 'clone.default', '_unsafe_view.default']
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, str], fx.GraphModule | None] = {}

    def __call__(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], used: Collection[int] | None
    ) -> fx.GraphModule | None:
        """Return the functional graph of an operator's decomposition, or None.

        Parameters
        ----------
        target : torch._ops.OpOverload
            Anything else (a higher-order operator, a Python function) has no decomposition.
        args, kwargs : sequence, mapping
            Arguments; of tensors only shape and data type are read.
        used : collection of int or None
            Which of several outputs somebody reads; the others are not computed. None means all.

        Returns
        -------
        torch.fx.GraphModule or None
            Its inputs are the tensors among the arguments, in order; every node has ``meta["val"]``.
        """
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return None
        flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        described = [
            (tuple(map(int, item.shape)), item.dtype) if isinstance(item, torch.Tensor) else item
            for item in flat
        ]
        key = (target, f"{described} {spec} {used if used is None else sorted(used)}")
        if key not in self._graphs:
            self._graphs[key] = _trace(target, flat, spec, used)
        return self._graphs[key]


def _trace(
    target: torch._ops.OpOverload, flat: Sequence[Any], spec: Any, used: Collection[int] | None
) -> fx.GraphModule | None:
    from torch._decomp import decomposition_table

    registered = decomposition_table.get(target)
    if not _has_decomposition(target):
        return None
    try:
        graph = _make_graph(target, {} if registered is None else {target: registered}, flat, spec)
    except Exception:  # a decomposition that reads numbers, or fails in any other way
        return None
    _drop_unread(graph, used)
    _name_views(graph)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if len(calls) > LARGEST_DECOMPOSITION or any(node.target is target or _is_unsafe(node) for node in calls):
        return None
    if calls and not any(find_rule(node.target) or _has_decomposition(node.target) for node in calls):
        return None
    return graph if _computes_the_same(graph, target, flat, spec) else None


def _has_decomposition(target: Any) -> bool:
    from torch._decomp import decomposition_table

    return isinstance(target, torch._ops.OpOverload) and (
        target in decomposition_table or target._can_decompose()
    )


def _make_graph(
    target: torch._ops.OpOverload, table: dict[Any, Any], flat: Sequence[Any], spec: Any
) -> fx.GraphModule:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [place for place, item in enumerate(flat) if isinstance(item, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        args, kwargs = pytree.tree_unflatten(given, spec)
        return target(*args, **kwargs)

    silenced = logging.getLogger("torch._subclasses.fake_tensor")  # logs every failure, which is no news here
    level = silenced.level
    silenced.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = [
                torch.empty(tuple(map(int, flat[place].shape)), dtype=flat[place].dtype) for place in places
            ]
            return make_fx(dispatch_functionalize(call), decomposition_table=table)(*tensors)
    finally:
        silenced.setLevel(level)


def _drop_unread(graph: fx.GraphModule, used: Collection[int] | None) -> None:
    """Drop what only outputs without a reader need: it would constrain for nothing."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    (results,) = output.args
    if used is not None and isinstance(results, (list, tuple)):
        output.args = (tuple(item if place in used else None for place, item in enumerate(results)),)
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _name_views(graph: fx.GraphModule) -> None:
    """Replace ``as_strided``, which reads memory, by the view that it is of a dense tensor."""
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.as_strided.default or len(node.args) > 3 or node.kwargs:
            continue
        before, after = node.args[0].meta["val"], node.meta["val"]
        if before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel():
            node.target, node.args = torch.ops.aten.view.default, node.args[:2]
    graph.recompile()


def _is_unsafe(node: fx.Node) -> bool:
    """Return whether a node writes into its operands, or yields memory that somebody may read unwritten."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    unwritten = operator_name(node.target) in _UNWRITTEN
    return schema.is_mutable or (unwritten and not all(_overwrites(user, node) for user in node.users))


def _overwrites(user: fx.Node, node: fx.Node) -> bool:
    return (
        operator_name(user.target) in ("copy", "fill")
        and user.all_input_nodes.count(node) == 1
        and (user.args[0] is node)
    )


def _computes_the_same(
    graph: fx.GraphModule, target: torch._ops.OpOverload, flat: Sequence[Any], spec: Any
) -> bool:
    """Compare with the operator itself on drawn numbers; what is too large or refuses them passes."""
    nodes = [node.meta.get("val") for node in graph.graph.nodes]
    if sum(item.numel() for item in nodes if isinstance(item, torch.Tensor)) > LARGEST_COMPARED:
        return True
    generator = torch.Generator().manual_seed(0)
    given = [_draw(item, generator) if isinstance(item, torch.Tensor) else item for item in flat]
    args, kwargs = pytree.tree_unflatten(given, spec)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = target(*args, **kwargs)
            results = graph(*(item for item in given if isinstance(item, torch.Tensor)))
        except Exception:  # drawn integers are no valid indices, say
            return True
    pairs = zip(_listed(expected), _listed(results), strict=False)
    return all(
        torch.allclose(left, right.to(left.dtype), rtol=1e-3, atol=1e-5, equal_nan=True)
        for left, right in pairs
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _draw(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(map(int, like.shape))
    if like.dtype.is_floating_point or like.dtype.is_complex:
        kind = torch.complex128 if like.dtype.is_complex else torch.float64
        return torch.rand(shape, generator=generator, dtype=kind).to(like.dtype)
    return torch.randint(2, shape, generator=generator).to(like.dtype)
